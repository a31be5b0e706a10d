"""Turn request bodies into tokenized requests for an engine, within the limits of one request."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

import parallelmind as pm
from parallelmind.data.encode import encode_texts
from parallelmind.engine.request import TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.tokenization import tokenize, tokenize_request
from parallelmind.errors import first_line
from serving.config import BASE, AppConfig
from serving.engine.messages import EngineRequest
from serving.ingress.independent import BRANCH_OF_MAIN, MAIN_CONTINUED, as_independent, split_prompts
from serving.observability.log import log
from serving.protocol.branches import AddBranchRequest, BranchesRequest
from serving.protocol.errors import user_error
from serving.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    OpenAIRequest,
    Sampling,
    TokenizeRequest,
    new_id,
)

_DEFAULT_CHAT_TOKENS = 1024
_LONG_BODY_BYTES = 20_000  # tokenizing a longer body would block the event loop

BodyT = TypeVar("BodyT")
ResultT = TypeVar("ResultT")


class RequestPreprocessor:
    """Makes engine requests. Methods named after routes raise UserError for a rejected request."""

    def __init__(
        self, config: AppConfig, tokenizer: PreTrainedTokenizerBase, max_context_tokens: int | None
    ) -> None:
        """max_context_tokens: positions that the model supports; None if unknown."""
        self.config, self.tokenizer, self.max_context_tokens = config, tokenizer, max_context_tokens

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
        """Every prompt is continued n times: independently, or as the branches of one sample."""
        self.require_model(request.model)
        self._require_branches("n" if request.n > 1 else "prompt", len(request.prompt) * request.n)
        prompts = [
            self._encode(f"prompt[{index}]", prompt, first=True)
            for index, prompt in enumerate(request.prompt)
        ]
        settings = request.sampling_fields(
            self._max_new_tokens(request, request.max_tokens), request.logprobs
        )
        if request.visibility == "columnar":
            samples = [pm.Sample("", [prompt for prompt in prompts for _ in range(request.n)])]
        else:
            samples = split_prompts(prompts, request.n)
        return self._openai_request("cmpl", "prompt", request, samples, MAIN_CONTINUED, settings, prompts)

    def chat(self, request: ChatRequest) -> EngineRequest:
        """The conversation is main; the header of the assistant's turn begins every branch."""
        self.require_model(request.model)
        self._require_branches("n", request.n)
        if request.top_logprobs is not None and not request.logprobs:
            raise pm.UserError(
                f"top_logprobs={request.top_logprobs}: needs logprobs=true; add it, or remove top_logprobs"
            )
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        main, header = self._conversation(request)
        max_new_tokens = request.max_completion_tokens
        if max_new_tokens is None:
            max_new_tokens = request.max_tokens
        if max_new_tokens is None:
            max_new_tokens = self._default_chat_tokens(len(main) + len(header))
        samples = [pm.Sample(main, [header] * request.n)]
        settings = request.sampling_fields(max_new_tokens, logprobs)
        return self._openai_request(
            "chatcmpl", "messages", request, samples, BRANCH_OF_MAIN, settings, [main + header]
        )

    def branches(self, request: BranchesRequest) -> EngineRequest:
        self.require_model(request.model)
        self._require_branches("branches", len(request.branches) + (request.reduce is not None))
        main = self._encode("main", request.main, first=True) if request.main else []
        prompts = [
            self._encode(f"branches[{index}].text", branch.text, first=not main)
            for index, branch in enumerate(request.branches)
        ]
        reduce = None if request.reduce is None else self._encode("reduce", request.reduce, first=False)
        sample = tokenize_request(
            self.tokenizer,
            pm.Sample(main, prompts),
            [branch.given_sampling_fields() for branch in request.branches],
            reduce,
            self._branch_sampling(request),
        )
        self._require_tokens("branches", sample.num_prompt_tokens, sample.params)
        return EngineRequest(new_id("smp"), request.model, [_with_seeds(sample)])

    def added_branch(self, request: AddBranchRequest) -> tuple[list[int], SamplingParams]:
        """Tokens and settings of a branch for a running sample."""
        ids = self._encode("text", request.text, first=False)
        params = SamplingParams.of(self._branch_sampling(request))
        self._require_tokens("text", len(ids), [params])
        return ids, _with_seed(params)

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
        request: OpenAIRequest,
        samples: Sequence[pm.Sample],
        branch_number: int,
        settings: dict[str, Any],
        prompts: Sequence[list[int]],
    ) -> EngineRequest:
        """Samples within the limits.

        field: named in the error if a prompt is too long. branch_number: of independent branches.
        prompts: token ids of each prompt, as the client counts them.
        """
        tokenized = [tokenize_request(self.tokenizer, sample, None, None, settings) for sample in samples]
        if request.visibility == "columnar":
            longest = sum(sample.num_prompt_tokens for sample in tokenized)
        else:
            longest = max(map(len, prompts))
            tokenized = [as_independent(sample, branch_number, request.n) for sample in tokenized]
        self._require_tokens(field, longest, tokenized[0].params)
        return EngineRequest(
            new_id(id_prefix), request.model, list(map(_with_seeds, tokenized)), sum(map(len, prompts))
        )

    def _conversation(self, request: ChatRequest) -> tuple[list[int], list[int]]:
        """Token ids of the conversation, and of the header of the assistant's turn.

        Together they are those of `apply_chat_template`: the template has written all special tokens.
        """
        without_header, ids = encode_texts(self.tokenizer, self._render_messages(request))
        length = len(without_header)
        if not 0 < length < len(ids) or ids[:length] != without_header:
            length = len(ids) - 1  # the conversation is rendered or tokenised differently without the header
        return ids[:length], ids[length:]

    def _render_messages(self, request: ChatRequest) -> list[str]:
        """The conversation by the model's template, without and with the header of the assistant's turn."""
        messages = [
            {
                "role": message.role,
                "content": message.text,
                **({"name": message.name} if message.name is not None else {}),
            }
            for message in request.messages
        ]
        if not self.tokenizer.chat_template:
            raise pm.UserError("messages: the model has no chat template; use /v1/completions")
        try:
            return [
                str(
                    self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
                )
                for header in (False, True)
            ]
        except Exception as error:  # a template is a program of the model and may raise anything
            raise pm.UserError(
                f"messages: the model's chat template refuses them ({first_line(error)}); change them"
            ) from error

    def _default_chat_tokens(self, prompt_tokens: int) -> int:
        """Default max_tokens of a chat."""
        room = (
            _DEFAULT_CHAT_TOKENS
            if self.max_context_tokens is None
            else self.max_context_tokens - prompt_tokens
        )
        return max(1, min(_DEFAULT_CHAT_TOKENS, room, self.config.limits.max_new_tokens))

    def _branch_sampling(self, request: BranchesRequest | AddBranchRequest) -> dict[str, Any]:
        max_new_tokens = self._max_new_tokens(request, request.max_tokens)
        return {**request.all_sampling_fields(), "max_new_tokens": max_new_tokens}

    def _max_new_tokens(self, request: Sampling, max_tokens: int) -> int:
        """max_tokens of the request, or its default within the limit."""
        is_given = "max_tokens" in request.model_fields_set
        return max_tokens if is_given else min(max_tokens, self.config.limits.max_new_tokens)

    def _encode(self, field: str, text: str | list[int], first: bool) -> list[int]:
        """Token ids of a text. Raises UserError for a text without a token and for invalid ids."""
        try:
            ids = tokenize(self.tokenizer, text, first)
        except pm.UserError as error:
            raise pm.UserError(f"{field}: {error}") from error
        if not ids:
            raise pm.UserError(f"{field}: holds no token; give it text")
        return ids

    def _require_branches(self, field: str, branches: int) -> None:
        limit = self.config.limits.max_branches
        if branches > limit:
            raise pm.UserError(f"{field}: {branches} branches, {limit} allowed in one request; send several")

    def _require_tokens(self, field: str, prompt_tokens: int, params: Sequence[SamplingParams]) -> None:
        limit = self.config.limits.max_prompt_tokens
        if prompt_tokens > limit:
            raise pm.UserError(
                f"{field}: {prompt_tokens} tokens, {limit} allowed; shorten it or send several requests"
            )
        longest = max(branch.max_new_tokens for branch in params)
        if longest > self.config.limits.max_new_tokens:
            raise pm.UserError(
                f"max_new_tokens={longest}: {self.config.limits.max_new_tokens} allowed; give no more"
            )


def _with_seeds(sample: TokenizedRequest) -> TokenizedRequest:
    """The sample with a seed for every branch: another engine draws the same tokens after a failure."""
    return replace(sample, params=[_with_seed(params) for params in sample.params])


def _with_seed(params: SamplingParams) -> SamplingParams:
    return params if params.seed is not None else replace(params, seed=secrets.randbits(62))
