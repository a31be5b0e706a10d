"""Turn request bodies into tokenized requests for an engine, within the limits of one request."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

import parallelmind as pm
from parallelmind.engine.grammar import Grammar
from parallelmind.engine.request import TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.tokenization import tokenize, tokenize_branches, tokenize_request
from serving.config import BASE, AppConfig
from serving.engine.messages import EngineRequest
from serving.ingress.chat_prompts import ChatPrompts, user_turn
from serving.ingress.independent import PromptSamples, common_beginning
from serving.ingress.sample_limits import SampleLimits
from serving.ingress.segments import branches_of, own_settings, sample_of, segment_of, with_params
from serving.observability.log import log
from serving.protocol.branches import Branch, BranchesRequest, BranchSettings, ForkRequest, Segment
from serving.protocol.errors import user_error
from serving.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
    new_id,
)
from serving.protocol.responses import ResponsesRequest
from serving.protocol.score import ScoreRequest
from serving.protocol.tools import ToolFields

_DEFAULT_CHAT_TOKENS = 1024
_LONG_BODY_BYTES = 20_000  # tokenizing a longer body would block the event loop

# What /v1/responses calls fields of a chat.
_NAMES_OF_RESPONSES = {
    r"\bmessages\b": "input",
    r"\bmax_(new_)?tokens\b": "max_output_tokens",
    r"^response_format\b": "text.format",
}

BodyT = TypeVar("BodyT")
ResultT = TypeVar("ResultT")


class RequestPreprocessor:
    """Makes engine requests. Methods named after routes raise UserError for a rejected request."""

    def __init__(
        self, config: AppConfig, tokenizer: PreTrainedTokenizerBase, max_context_tokens: int | None
    ) -> None:
        """max_context_tokens: positions that the model supports; None if unknown."""
        self.config, self.tokenizer, self.max_context_tokens = config, tokenizer, max_context_tokens
        self._limits, self._chats = SampleLimits(config.limits, max_context_tokens), ChatPrompts(tokenizer)

    async def run(self, method: Callable[[BodyT], ResultT], body: BodyT, body_bytes: int) -> ResultT:
        """Call one of the methods below, in a thread for a long body.

        Raises RequestError for a request that is not served.
        """
        if self.config.log.log_prompts:
            log.info("request body: %r", body)
        try:
            if body_bytes > _LONG_BODY_BYTES:
                return await asyncio.to_thread(method, body)
            return method(body)
        except pm.UserError as error:
            raise user_error(str(error)) from error

    def completion(self, request: CompletionRequest) -> EngineRequest:
        """Every prompt is continued n times, after main if there is one."""
        self.require_model(request.model)
        self._limits.require_branches("n" if request.n > 1 else "prompt", len(request.prompt) * request.n)
        main = self._encode("main", request.main, first=True) if request.main else []
        prompts = [
            self._encode(f"prompt[{index}]", prompt, first=not main)
            for index, prompt in enumerate(request.prompt)
        ]
        max_new_tokens = self._max_new_tokens(request, request.max_tokens)
        if request.decodes_nothing:
            max_new_tokens = 1  # the step that reads the prompt; its token is left out of the answer
        settings = request.sampling_fields(max_new_tokens, request.logprobs)
        settings["prompt_logprobs"] = request.logprobs if request.echo else None
        samples = PromptSamples.of(main, prompts, request.n, request.visibility, request.scores_prompt)
        return self._openai_request("cmpl", "prompt", request.model, samples, settings)

    def chat(self, request: ChatRequest) -> EngineRequest:
        """The conversation is main. Every branch is a question, if there are any, and begins the answer."""
        self.require_model(request.model)
        num_questions = 1 if request.questions is None else len(request.questions)
        self._limits.require_branches("n" if request.n > 1 else "questions", num_questions * request.n)
        if request.top_logprobs is not None and not request.logprobs:
            raise pm.UserError(
                f"top_logprobs={request.top_logprobs}: needs logprobs=true; add it, or remove top_logprobs"
            )
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        request.check_tools()
        turns, tools = self._chats.turns(request.messages, request.shown_tools)
        if request.questions is None:
            forks = [self._chats.conversation(turns, tools)]
        else:
            questions = [[user_turn(question)] for question in request.questions]
            forks = self._chats.forks(turns, questions, tools)
        samples = PromptSamples.of_forks(forks, request.n, request.visibility)
        max_new_tokens = request.max_completion_tokens
        if max_new_tokens is None:
            max_new_tokens = request.max_tokens
        if max_new_tokens is None:
            max_new_tokens = self._limits.default_tokens(_DEFAULT_CHAT_TOKENS, samples.longest)
        settings = request.sampling_fields(max_new_tokens, logprobs)
        if request.requires_call:
            settings["grammar"] = self._call_grammar(request, settings["grammar"])
        return self._openai_request("chatcmpl", "messages", request.model, samples, settings)

    def responses(self, request: ResponsesRequest) -> EngineRequest:
        """As a chat, with the names of the fields of /v1/responses in its errors."""
        try:
            return replace(self.chat(request.as_chat()), id=new_id("resp"))
        except pm.UserError as error:
            message = str(error)
            for pattern, name in _NAMES_OF_RESPONSES.items():
                message = re.sub(pattern, name, message)
            raise pm.UserError(message) from error

    def score(self, request: ScoreRequest) -> EngineRequest:
        """Every option is the prompt of a branch of main, of which one token is decoded and not returned."""
        self.require_model(request.model)
        self._limits.require_branches("options", len(request.options))
        if bool(request.main) == bool(request.messages):
            raise pm.UserError("main: give main or messages, one of them, which the options follow")
        if request.messages:
            fork = self._chats.conversation(*self._chats.turns(request.messages))
            main = fork.main + fork.rest
        else:
            main = self._encode("main", request.main, first=True)
        options = [
            self._encode(f"options[{index}]", option, first=False)
            for index, option in enumerate(request.options)
        ]
        settings = {"max_new_tokens": 1, "prompt_logprobs": 0}
        samples = PromptSamples.of(main, options, 1)
        return self._openai_request(
            "score", "main" if request.main else "messages", request.model, samples, settings
        )

    def branches(self, request: BranchesRequest) -> EngineRequest:
        self.require_model(request.model)
        # Before the conversation is rendered and tokenised once for each.
        self._limits.require_branches("branches", len(request.branches))
        self._limits.require_branches("documents", len(request.documents))
        request.check_tools()
        settings = [
            self._own_settings(f"branches[{index}].", branch, request)
            for index, branch in enumerate(request.branches)
        ]
        sample = sample_of(request, *self._branch_prompts(request), settings, self._encode)
        self._limits.require_branches("branches", sum(1 for _ in sample.walk()))
        tokenized = tokenize_request(self.tokenizer, sample, None, None, self._branch_sampling(request))
        self._limits.require_tokens("branches", tokenized.num_prompt_tokens, tokenized.params)
        return EngineRequest(new_id("smp"), request.model, [_with_seeds(tokenized)])

    def added_segment(self, request: Segment) -> pm.Segment:
        """A segment, and all below it, for a running sample."""
        segment = segment_of(request, self._encode)
        (added,) = self._added("text", [segment], self._branch_sampling(BranchSettings()))
        return added

    def fork(self, request: ForkRequest) -> list[pm.Segment]:
        """The branches that continue a running branch."""
        return self._added("branches", branches_of(request, self._encode), self._branch_sampling(request))

    def _added(self, field: str, segments: list[pm.Segment], settings: dict[str, Any]) -> list[pm.Segment]:
        """The segments with all of their settings, within the limits of one request."""
        tokenized = tokenize_branches(self.tokenizer, segments, settings)
        self._limits.require_branches("branches", tokenized.num_branches)
        self._limits.require_tokens(field, tokenized.num_prompt_tokens, tokenized.params)
        params = iter(_with_seeds(tokenized).params)
        return [with_params(segment, params) for segment in segments]

    def tokenize(self, request: TokenizeRequest) -> list[int]:
        """Token ids of a text at the beginning of a sample."""
        self.require_model(request.model or BASE)
        return tokenize(self.tokenizer, request.prompt, first=True) if request.prompt else []

    def detokenize(self, request: DetokenizeRequest) -> str:
        self.require_model(request.model or BASE)
        size = len(self.tokenizer)
        wrong = [token for token in request.tokens if not 0 <= token < size]
        if wrong:
            raise pm.UserError(f"tokens={wrong[0]}: give ids from 0 to {size - 1}")
        return str(self.tokenizer.decode(request.tokens))

    def require_model(self, model: str) -> None:
        if model not in (self.config.model.name, BASE) and self.config.adapter_sources.locate(model) is None:
            raise pm.UserError(f"model={model[:80]!r}: not served here; use {', '.join(self.config.names)}")

    def _openai_request(
        self,
        id_prefix: str,
        field: str,
        model: str,
        prompts: PromptSamples,
        settings: dict[str, Any],
    ) -> EngineRequest:
        """Prompts within the limits. field: named in the error if a prompt is too long."""
        self._limits.require_context(field, prompts.longest, settings["max_new_tokens"])
        samples = [
            prompts.finish(tokenize_request(self.tokenizer, sample, None, None, settings))
            for sample in prompts.samples
        ]
        self._limits.require_tokens(field, prompts.longest, samples[0].params)
        return EngineRequest(new_id(id_prefix), model, list(map(_with_seeds, samples)), prompts.prompt_tokens)

    def _call_grammar(self, request: ToolFields, other: Grammar | None) -> Grammar | None:
        """The grammar of an answer that has to call a tool. Raises UserError if there is another one."""
        if other is not None:
            raise pm.UserError(f"tool_choice: {other.field} is given too; give one of them")
        return self._chats.tools.grammar(request)

    def _own_settings(self, path: str, branch: Branch, request: BranchesRequest) -> dict[str, Any]:
        """The settings of a branch of main that take the place of the request's."""
        own = own_settings(path, branch)
        if branch.messages and request.requires_call:
            own["grammar"] = self._call_grammar(request, branch.grammar or request.grammar)
        return own

    def _branch_prompts(self, request: BranchesRequest) -> tuple[list[int], list[list[int]]]:
        """Token ids of main, and of the prompts of the branches."""
        if request.main and request.messages:
            raise pm.UserError("main: messages take its place; give one of them")
        main = self._encode("main", request.main, first=True) if request.main else []
        turns, tools = self._chats.turns(request.messages or [], request.shown_tools)
        asked = [self._chats.turns(branch.messages)[0] for branch in request.branches if branch.messages]
        if request.shown_tools and not asked:
            raise pm.UserError("tools: no branch has messages; give messages, or leave tools out")
        forks = self._chats.forks(turns, asked, tools, continues=bool(main))
        mains = [fork.main for fork in forks]
        # A text, or a document, follows the turns, and no marker of another turn.
        if len(forks) < len(request.branches) or request.documents:
            mains.append(self._chats.ids(turns, tools) if turns else [])
        shared = common_beginning(mains)
        main += shared
        chats = iter((fork.main + fork.rest)[len(shared) :] for fork in forks)
        return main, [
            next(chats)
            if branch.text is None
            else self._encode(f"branches[{index}].text", branch.text, not main)
            for index, branch in enumerate(request.branches)
        ]

    def _branch_sampling(self, request: BranchSettings) -> dict[str, Any]:
        max_new_tokens = self._max_new_tokens(request, request.max_tokens)
        return {**request.all_sampling_fields(), "max_new_tokens": max_new_tokens}

    def _max_new_tokens(self, request: Sampling, max_tokens: int) -> int:
        """max_tokens of the request, or its default within the limit."""
        is_given = "max_tokens" in request.model_fields_set
        return max_tokens if is_given else self._limits.default_tokens(max_tokens)

    def _encode(self, field: str, text: str | list[int], first: bool) -> list[int]:
        """Token ids of a text. Raises UserError for a text without a token and for invalid ids."""
        try:
            ids = tokenize(self.tokenizer, text, first)
        except pm.UserError as error:
            raise pm.UserError(f"{field}: {error}") from error
        if not ids:
            raise pm.UserError(f"{field}: holds no token; give it text")
        return ids


def _with_seeds(sample: TokenizedRequest) -> TokenizedRequest:
    """The sample with a seed for every branch: another engine draws the same tokens after a failure."""
    return replace(sample, params=[_with_seed(params) for params in sample.params])


def _with_seed(params: SamplingParams) -> SamplingParams:
    return params if params.seed is not None else replace(params, seed=secrets.randbits(62))
