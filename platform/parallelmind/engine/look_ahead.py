"""A decoding step that an accelerator computes before the host has read the tokens that it starts from.

The host reads the tokens of one step while the next one runs. Which branches end with these tokens, and what
else happens until the next plan, is known only then: the plan takes the rows that it needs, and drops the
others. A row does not depend on the other rows, and what is dropped lies behind the tokens that count as
computed. Without anything computed ahead, the same plan gives the same tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from parallelmind.engine.decode_batch import DecodeStep
from parallelmind.model.transfer import to_device


class LookAhead(NamedTuple):
    """A step that was computed ahead. logits: `[branches, vocab]`, on the device."""

    step: DecodeStep
    logits: Tensor

    def logits_of(self, planned: DecodeStep) -> Tensor | None:
        """The logits of a planned step; None unless this one has computed all of its tokens."""
        rows = self.step.rows_of(planned.batch)
        if rows is None or not np.array_equal(self.step.slots[rows], planned.slots):
            return None
        if np.array_equal(rows, np.arange(len(self.logits))):
            return self.logits
        return self.logits.index_select(0, to_device(rows, self.logits.device))
