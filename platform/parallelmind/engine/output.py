"""What decoded tokens add to the text of a branch, and the detection of its end. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from parallelmind.engine.detokenizer import Detokenizer, TokenDecoder, Tokenizer
from parallelmind.engine.fork_parser import Fork, ForkParser, overlap
from parallelmind.engine.grammar_matcher import GrammarMatcher
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.errors import DecodingError

FinishReason = Literal["stop", "length", "forked", "cancelled", "error"]


class TokenLogprob(NamedTuple):
    """A token of a prompt. logprob, top: as `SamplingParams.prompt_logprobs` asks.

    logprob is None for a token that no computed token precedes: the first of a sample, and that of a reduce.
    It is None, too, for the first of a branch that is added when the token before it has been computed.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
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
    fork: on the last event of a branch that has forked by itself. The titles are not part of its text.
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
    fork: Fork | None = None

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
        num_withheld = max((overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - num_withheld
        self._withheld = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """The withheld text: the branch ends without a stop text."""
        text, self._withheld = self._withheld, ""
        return text


_NO_STOPS = StopChecker(())  # withholds nothing, so that all branches without stop texts share it


class OutputProcessor:
    """Turns the decoded tokens of one branch into text, and detects its end.

    num_left: tokens that the branch may still decode.
    """

    __slots__ = ("_detokenizer", "_eos_token_ids", "_forks", "_stop_checker", "matcher", "num_left")

    def __init__(
        self,
        tokenizer: Tokenizer | TokenDecoder,
        prompt: Sequence[int],
        params: SamplingParams,
        eos_token_ids: frozenset[int],
        matcher: GrammarMatcher | None = None,
        forks: ForkParser | None = None,
    ) -> None:
        """matcher: of the grammar that the branch follows, at its beginning. forks: finds those it writes."""
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop_checker = StopChecker(params.stop) if params.stop else _NO_STOPS
        self._eos_token_ids = frozenset[int]() if params.ignore_eos else eos_token_ids
        self.num_left = params.max_new_tokens
        self.matcher, self._forks = matcher, forks

    def process(self, token: int) -> tuple[str, FinishReason | None]:
        """The text to show for `token`, and why the branch finishes with it, if it does."""
        self.num_left -= 1
        if token in self._eos_token_ids:
            return self.flush()[0], "stop"
        is_complete = self.matcher is not None and self.matcher.accept(token)
        text, stopped = self._stop_checker.push(self._decode(token))
        if stopped or (self.num_left and not is_complete):
            return text, "stop" if stopped else None
        rest, stopped = self.flush()
        return text + rest, "stop" if stopped or is_complete else "length"

    def flush(self) -> tuple[str, bool]:
        """All text that is left, and whether it contained a stop text."""
        text = self._detokenizer.flush()
        if self._forks is not None:
            text = self._forks.push(text) + self._forks.refuse()
        text, stopped = self._stop_checker.push(text)
        return (text, True) if stopped else (text + self._stop_checker.flush(), False)

    @property
    def titles(self) -> tuple[str, ...]:
        """The titles of the fork that the last token completed; empty without one."""
        return () if self._forks is None else self._forks.titles

    def accept_fork(self) -> str:
        """All text that is left, without the titles: the branch ends with its fork."""
        text, _ = self._stop_checker.push("" if self._forks is None else self._forks.accept())
        return text + self._stop_checker.flush()

    def refuse_fork(self) -> tuple[str, FinishReason | None]:
        """The fork as text to show, and why the branch finishes with it, if it does."""
        text, stopped = self._stop_checker.push("" if self._forks is None else self._forks.refuse())
        return text, "stop" if stopped else None

    def _decode(self, token: int) -> str:
        if self._forks is None:
            return self._detokenizer.push(token)
        if marker := self._forks.special.get(token):
            return self._forks.push(self._detokenizer.flush() + marker)
        return self._forks.push(self._detokenizer.push(token))
