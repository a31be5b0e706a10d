"""How far branches have come in their grammars, and which tokens these allow next. No torch."""

from __future__ import annotations

from time import thread_time
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from parallelmind.tree import Ints

_MAX_MASK_S = 1.0  # processor time of one mask; a usual one takes some 10 µs


class GrammarMatcher:
    """How far one branch has come in its grammar. Its state follows from the branch's tokens alone.

    error: why no further token can be decoded, in one line; None while one can.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.error: str | None = None

    def accept(self, token: int) -> bool:
        """Accept a token; returns whether the text is complete and no further token is allowed."""
        if not self._matcher.consume_token(token):
            self.error = f"token {token} does not follow from the grammar ({self._reason()})"
            return False
        return bool(self._matcher.is_stopped())

    def fill_mask(self, bits: NDArray[np.uint8]) -> None:
        """Set the bits of the tokens that may come next; `bits` is one contiguous row."""
        start = thread_time()
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            self.error = f"the grammar is too complex ({self._reason()})"
        elif thread_time() - start > _MAX_MASK_S:
            self.error = f"the grammar is too complex (more than {_MAX_MASK_S:g} s for one token)"

    def _reason(self) -> str:
        lines = self._matcher.get_error().splitlines()
        return lines[0] if lines else str(self._matcher.stop_reason())


class TokenMasks(NamedTuple):
    """The tokens that grammars allow.

    rows: `[masked]` rows of logits that have a grammar. bits: `[masked, bytes]`; bit b of byte k stands for
    token 8 k + b.
    """

    rows: Ints
    bits: NDArray[np.uint8]
