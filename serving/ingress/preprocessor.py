"""Requests as samples in tokens: prompts and templates are encoded here, and limits are kept, before any
engine is asked.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

import parallelmind as pm
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.tokenization import tokenize, tokenize_request
from parallelmind.errors import first_line
from serving.config import BASE, AppConfig
from serving.engine.messages import EngineRequest
from serving.protocol.branches import AddBranchRequest, BranchesRequest
from serving.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
    fresh_id,
)

_DEFAULT_CHAT_TOKENS = 1024
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how a vocabulary of characters names a byte
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # and one of bytes each of its own

Ids = Sequence[int]


class RequestPreprocessor:
    """Turns bodies into work. Everything raises UserError for what is not served."""

    def __init__(self, config: AppConfig, tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
        """context: most positions that the model was made for, if there is such a number."""
        self.config, self.tokenizer, self.context = config, tokenizer, context

    def completion(self, request: CompletionRequest) -> EngineRequest:
        """Every prompt n times, one after another."""
        self.require_model(request.model)
        self._require_branches("n" if request.n > 1 else "prompt", len(request.prompt) * request.n)
        prompts = [
            self._encoded(f"prompt[{place}]", prompt, True) for place, prompt in enumerate(request.prompt)
        ]
        sample = pm.Sample("", [prompt for prompt in prompts for _ in range(request.n)])
        settings = request.settings(self._most(request, request.max_tokens), request.logprobs)
        return self._work("cmpl", "prompt", request.model, sample, settings)

    def chat(self, request: ChatRequest) -> EngineRequest:
        """The conversation is main; what opens the assistant's turn begins every branch."""
        self.require_model(request.model)
        self._require_branches("n", request.n)
        if request.top_logprobs is not None and not request.logprobs:
            raise pm.UserError(
                f"top_logprobs={request.top_logprobs}: needs logprobs=true; add it, or leave this out"
            )
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        main, turn = self._conversation(request)
        asked = (
            request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        )
        most = self._rest(len(main) + len(turn)) if asked is None else asked
        sample = pm.Sample(main, [turn] * request.n)
        return self._work("chatcmpl", "messages", request.model, sample, request.settings(most, logprobs))

    def branches(self, request: BranchesRequest) -> EngineRequest:
        self.require_model(request.model)
        self._require_branches("branches", len(request.branches) + (request.reduce is not None))
        main = self._encoded("main", request.main, True) if request.main else []
        texts = [
            self._encoded(f"branches[{place}].text", branch.text, not main)
            for place, branch in enumerate(request.branches)
        ]
        last = None if request.reduce is None else self._encoded("reduce", request.reduce, False)
        settings = {**request.all(), "max_new_tokens": self._most(request, request.max_tokens)}
        own = [branch.own() for branch in request.branches]
        return self._work("smp", "branches", request.model, pm.Sample(main, texts), settings, own, last)

    def joining(self, request: AddBranchRequest) -> tuple[list[int], SamplingParams]:
        """A late branch: its tokens and settings."""
        ids = self._encoded("text", request.text, False)
        params = SamplingParams.of(
            {**request.all(), "max_new_tokens": self._most(request, request.max_tokens)}
        )
        self._require_tokens("text", len(ids), [params])
        return ids, _seeded(params)

    def tokenize(self, request: TokenizeRequest) -> list[int]:
        """As the beginning of a sample."""
        self.require_model(request.model or BASE)
        return tokenize(self.tokenizer, request.prompt, first=True) if request.prompt else []

    def detokenize(self, request: DetokenizeRequest) -> str:
        self.require_model(request.model or BASE)
        size = len(self.tokenizer)
        wrong = [token for token in request.tokens if not 0 <= token < size]
        if wrong:
            raise pm.UserError(f"tokens={wrong[0]}: give ids from 0 to {size - 1}")
        return str(self.tokenizer.decode(request.tokens))

    def spell(self, token: int) -> str:
        """The text of one token; its name in the vocabulary where that is half a character, or nothing."""
        text = str(self.tokenizer.decode([token]))
        return text if text and "\ufffd" not in text else str(self.tokenizer.convert_ids_to_tokens(token))

    def encoded(self, token: int) -> bytes | None:
        """The bytes of one token, which need not be whole characters; None where the vocabulary does not tell
        them.
        """
        text, name = str(self.tokenizer.decode([token])), str(self.tokenizer.convert_ids_to_tokens(token))
        if text and "\ufffd" not in text:
            return text.encode()
        byte = _BYTE.fullmatch(name)
        raw = bytes.fromhex(byte[1]) if byte else bytes(_BYTES.get(letter, 0) for letter in name)
        return (
            raw if raw.decode(errors="replace") == text else None
        )  # a vocabulary whose names are of another kind

    def require_model(self, model: str) -> None:
        if model not in (self.config.name, BASE) and self.config.locate(model) is None:
            raise pm.UserError(f"model={model[:80]!r}: not served here; use {', '.join(self.config.names)}")

    def _work(
        self,
        kind: str,
        field: str,
        model: str,
        sample: pm.Sample,
        settings: dict[str, Any],
        own: list[dict[str, Any]] | None = None,
        reduce: list[int] | None = None,
    ) -> EngineRequest:
        """field: to blame if there is too much of it."""
        asked = tokenize_request(self.tokenizer, sample, own, reduce, settings)
        last = asked.reduce
        read = len(asked.tokens.ids) + (len(last.token_ids) if last else 0)
        self._require_tokens(field, read, [*asked.params, *([last.params] if last else [])])
        # So that another engine could go on: whoever is to be drawn has a seed.
        params = [_seeded(each) for each in asked.params]
        return EngineRequest(
            fresh_id(kind),
            model,
            replace(asked, params=params, reduce=last and replace(last, params=_seeded(last.params))),
        )

    def _conversation(self, request: ChatRequest) -> tuple[list[int], list[int]]:
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
            begun, whole = (
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=turn)
                for turn in (False, True)
            )
        except Exception as error:  # a template is a program of the model's, and fails as it likes
            raise pm.UserError(
                f"messages: the model's template refuses them ({first_line(error)}); change them"
            ) from error
        text, turn = str(begun), str(whole).removeprefix(str(begun))
        if turn and str(whole) != turn:
            return tokenize(self.tokenizer, text, first=True), tokenize(self.tokenizer, turn, first=False)
        ids = tokenize(self.tokenizer, str(whole), first=True)
        return ids[:-1], ids[-1:]

    def _rest(self, prompt_tokens: int) -> int:
        """How long an answer may be for which nobody has said it."""
        room = _DEFAULT_CHAT_TOKENS if self.context is None else self.context - prompt_tokens
        return max(1, min(_DEFAULT_CHAT_TOKENS, room, self.config.max_new_tokens))

    def _require_branches(self, field: str, count: int) -> None:
        most = self.config.max_branches
        if count > most:
            raise pm.UserError(f"{field}: {count} branches, {most} allowed in one request; send several")

    def _encoded(self, field: str, text: str | list[int], first: bool) -> list[int]:
        """Raises UserError for a text without a token, and for ids that are none."""
        try:
            ids = tokenize(self.tokenizer, text, first)
        except pm.UserError as error:
            raise pm.UserError(f"{field}: {error}") from error
        if not ids:
            raise pm.UserError(f"{field}: holds no token; give it text")
        return ids

    def _most(self, settings: Sampling, asked: int) -> int:
        """New tokens of a branch: as many as asked for, or the default as far as it is allowed."""
        return asked if "max_tokens" in settings.model_fields_set else min(asked, self.config.max_new_tokens)

    def _require_tokens(self, field: str, prompt_tokens: int, params: Sequence[SamplingParams]) -> None:
        most = self.config.max_prompt_tokens
        if prompt_tokens > most:
            raise pm.UserError(
                f"{field}: {prompt_tokens} tokens, {most} allowed; shorten it or send several requests"
            )
        longest = max(each.max_new_tokens for each in params)
        if longest > self.config.max_new_tokens:
            raise pm.UserError(
                f"max_new_tokens={longest}: {self.config.max_new_tokens} allowed; give no more"
            )


def _seeded(params: SamplingParams) -> SamplingParams:
    return params if params.seed is not None else replace(params, seed=secrets.randbits(62))
