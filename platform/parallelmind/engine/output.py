"""Decoded tokens to text as they come, and the detection of a branch's end. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from parallelmind.engine.grammar_matcher import GrammarMatcher
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.errors import DecodingError

FinishReason = Literal["stop", "length", "forked", "cancelled", "error"]

_INCOMPLETE = "\ufffd"  # what a tokenizer decodes an incomplete character to
_MAX_PENDING = 8  # ids; a character has at most four bytes
_NUM_CONTEXT = 8  # prompt tokens that decide whether the first word begins with a space


class TokenLogprob(NamedTuple):
    """A token of a prompt. logprob, top: as `SamplingParams.prompt_logprobs` asks.

    logprob is None for a token that no computed token precedes: the first of a sample, and that of a reduce.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """What one decoded token adds to one branch.

    branch: index of the segment: 0..N-1 in the order of `Sample.walk`, then those that were added later.
    text: new text to show; often empty while a character or a stop text is incomplete.
    token: the decoded id; None where a branch ends without one.
    finish_reason: set on a branch's last event; "stop" is an end-of-text token or a stop text, "forked" the
        end of a branch that was forked while it ran.
    logprob, top: as `SamplingParams.logprobs` asks.
    sample: the engine's number of the sample.
    pos2d: the branch and time coordinates of the token. Where a segment ends without one, those of the first
        token of its prompt; None if it has not started.
    error: why the branch ended, in one line, if its finish reason is "error".
    prompt: the tokens of the prompt, on the first event of a branch with `SamplingParams.prompt_logprobs`.
    """

    branch: int
    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    sample: int = 0
    pos2d: tuple[int, int] | None = None
    error: str | None = None
    prompt: tuple[TokenLogprob, ...] = ()

    def start_pos2d(self, num_prompt: int) -> tuple[int, int] | None:
        """Coordinates of the segment's first token, from the first event of a segment.

        num_prompt: tokens of its prompt.
        """
        if self.pos2d is None or self.token is None:
            return self.pos2d
        branch, time = self.pos2d
        return branch, time - num_prompt

    def raise_error(self) -> None:
        """Raise DecodingError if the branch ended with an error."""
        if self.error is not None:
            raise DecodingError(f"branches[{self.branch}]: {self.error}")


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that turns ids into text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str | list[str]: ...


class Detokenizer:
    """Decodes a growing list of ids; a character that is split over tokens waits until it is complete.

    New text is what the pending ids add to their context, the ids of the text before them. A byte-fallback
    decoder may decode the context differently once invalid bytes follow it. Returned text stays as it is,
    and the pending ids are decoded without context then. The number of pending ids is bounded, because a
    model may decode ids that never become text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        # A fast tokenizer's own decode is the quickest; one that is written in Python has none.
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._decode_ids: Callable[..., Any] = (tokenizer if backend is None else backend).decode
        self._pending: list[int] = []
        ends = [list(prompt[-length:]) for length in range(min(_NUM_CONTEXT, len(prompt)), 0, -1)]
        # With an incomplete character in it, the context would return that character again.
        self._set_context(next((ids for ids in ends if not self._decode(ids).endswith(_INCOMPLETE)), []))

    def push(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        self._pending.append(token)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return self._oldest_text(text) if len(self._pending) > _MAX_PENDING else ""
        self._set_context(self._pending)
        self._pending = []
        return text

    def flush(self) -> str:
        """The text that is still incomplete, with the replacement character for incomplete bytes."""
        text, self._pending = self._new_text() if self._pending else "", []
        return text

    def _oldest_text(self, text: str) -> str:
        """The part of the pending `text` that no further id changes, without the last ids.

        Three ids may be the first bytes of a character.
        """
        pending = self._pending
        for num_kept in (3, 2, 1):
            self._pending = pending[:-num_kept]
            oldest = self._new_text()
            if text.startswith(oldest):
                if oldest:
                    self._set_context(self._pending)
                self._pending = pending[-num_kept:]
                return oldest
        self._pending = pending
        return ""

    def _new_text(self) -> str:
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(self._pending)

    def _set_context(self, ids: list[int]) -> None:
        self._context, self._context_text = ids, self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._decode_ids(ids, skip_special_tokens=True)) if ids else ""


class StopChecker:
    """Finds stop texts, and withholds text that may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._withheld = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop text was found after it."""
        if not self._stop:
            return text, False
        text, self._withheld = self._withheld + text, ""
        positions = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if positions:
            return text[: min(positions)], True
        num_withheld = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - num_withheld
        self._withheld = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """The withheld text: the branch ends without a stop text."""
        text, self._withheld = self._withheld, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`, `stop` itself excluded."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)


class OutputProcessor:
    """Turns the decoded tokens of one branch into text, and detects its end."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams,
        eos_token_ids: frozenset[int],
        matcher: GrammarMatcher | None = None,
    ) -> None:
        """matcher: of the grammar that the branch follows, at its beginning."""
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop_checker = StopChecker(params.stop)
        self._eos_token_ids = frozenset[int]() if params.ignore_eos else eos_token_ids
        self._num_left = params.max_new_tokens
        self.matcher = matcher

    def process(self, token: int) -> tuple[str, FinishReason | None]:
        """The text to show for `token`, and why the branch finishes with it, if it does."""
        self._num_left -= 1
        if token in self._eos_token_ids:
            return self.flush()[0], "stop"
        is_complete = self.matcher is not None and self.matcher.accept(token)
        text, stopped = self._stop_checker.push(self._detokenizer.push(token))
        if stopped or (self._num_left and not is_complete):
            return text, "stop" if stopped else None
        rest, stopped = self.flush()
        return text + rest, "stop" if stopped or is_complete else "length"

    def flush(self) -> tuple[str, bool]:
        """All text that is left, and whether it contained a stop text."""
        text, stopped = self._stop_checker.push(self._detokenizer.flush())
        return (text, True) if stopped else (text + self._stop_checker.flush(), False)
