"""Tokens of one branch to text, as they come: whole characters only, and never a part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tokenizers.decoders import DecodeStream

from parallelmind.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]

_INCOMPLETE = "\ufffd"
_CONTEXT = 8  # prompt tokens that decide whether the first word begins with a space


@dataclass(frozen=True, slots=True)
class Event:
    """What one decoded token adds to one branch.

    branch: 0..N-1, as in the sample.
    text: new text to show; often empty while a character or a stop text is incomplete.
    token: the decoded id; None where a branch ends without one.
    finish_reason: set on a branch's last event; "stop" is an end-of-text token or a stop text.
    logprob, top: as `SamplingParams.logprobs` asks.
    sample: the engine's number of the sample.
    pos2d: the branch and time coordinates of the token.
    """

    branch: int
    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    sample: int = 0
    pos2d: tuple[int, int] | None = None


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that turns ids into text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str | list[str]: ...


class Detokenizer:
    """Text of a growing list of ids; a character that is split over tokens waits until it is whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(
            tokenizer, "backend_tokenizer", None
        )  # none: a tokenizer written in Python
        self._pending: list[int] = []
        context = list(prompt[-_CONTEXT:])
        if self._decode(context).endswith(_INCOMPLETE):
            context = []  # the stream would say the prompt's half character again
        self._context = context
        self._stream = DecodeStream(ids=context, skip_special_tokens=True) if self._backend else None

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be none."""
        self._pending.append(token)
        piece = self._stream.step(self._backend, token) if self._stream else self._slow_step()
        if not piece:
            return ""
        self._pending.clear()
        return str(piece)

    def flush(self) -> str:
        """What is still incomplete, with the replacement character for broken bytes."""
        rest, self._pending = self._decode(self._pending), []
        return rest

    def _slow_step(self) -> str:
        """For tokenizers written in Python: the difference that the pending tokens make to their context."""
        before, after = self._decode(self._context), self._decode(self._context + self._pending)
        if after.endswith(_INCOMPLETE):
            return ""
        self._context = (self._context + self._pending)[-_CONTEXT:]
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


class StopChecker:
    """Withholds what might be the beginning of a stop text, and ends before one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop text has been met."""
        text, self._held = self._held + piece, ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


class OutputProcessor:
    """Follows one branch: what each decoded token adds to its text, and when the branch ends."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams,
        eos: frozenset[int],
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop_text = StopChecker(params.stop)
        self._eos = frozenset[int]() if params.ignore_eos else eos
        self._left = params.max_new_tokens

    def process(self, token: int) -> tuple[str, FinishReason | None]:
        """The text to show for `token`, and why the branch ends with it, if it does."""
        self._left -= 1
        if token in self._eos:
            return self._rest()[0], "stop"
        text, met = self._stop_text.push(self._detokenizer.push(token))
        if met or self._left:
            return text, "stop" if met else None
        rest, met = self._rest()
        return text + rest, "stop" if met else "length"

    def _rest(self) -> tuple[str, bool]:
        text, met = self._stop_text.push(self._detokenizer.flush())
        return (text, True) if met else (text + self._stop_text.flush(), False)
