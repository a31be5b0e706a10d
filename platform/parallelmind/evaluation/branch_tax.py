"""The branch tax: what it costs in loss that branches share a sequence, on the same text at every branch
count.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from parallelmind.config import RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.engine.model_runner import Model
from parallelmind.errors import UserError
from parallelmind.evaluation.peak_memory import PeakMemory, memory_in_use
from parallelmind.layout import Tokens
from parallelmind.model.patch import is_patched, rope_config
from parallelmind.model.structure import causal_lm
from parallelmind.training.loss import TargetLoss
from parallelmind.training.step import evaluate

Batches = Sequence[Sequence[Tokens]]  # the samples of every batch


@dataclass(frozen=True, slots=True)
class TaxPoint:
    """What one branch count costs.

    mean_branches: of the samples as they are, since the last ones of a text may hold fewer. loss: nats per
    target token. tax: that loss minus the loss of lone branches. tokens: read in all, main again in every
    sample that repeats it. peak_extra_bytes: the most memory above what the loaded model took.
    """

    branches: int
    mean_branches: float
    loss: float
    tax: float
    targets: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_extra_bytes: int


def largest_sample(batches: Batches) -> int:
    """Branches of the sample that has the most."""
    return max((sample.branches for batch in batches for sample in batch), default=0)


def tax_curve(model: Model, sets: Mapping[int, Batches], pad_id: int) -> Iterator[TaxPoint]:
    """Loss, speed and memory at every branch count, lone branches first.

    sets: the batches of the same text by branch count, 1 among them. Computes as validation in training does.
    Raises UserError for a text without a target.
    """
    rope = rope_config(model) if is_patched(model) else RopeConfig(patch_rope=False)
    loss = TargetLoss(model, rope.visibility, causal_lm(model).dtype).eval()
    evaluate(
        loss, [make_batch(batch[:1], rope, pad_id) for batch in sets[1][:1]]
    )  # weights are read when they are first used
    at_rest, lone = memory_in_use(loss.device), None
    for branches, batches in sorted(sets.items()):
        found = [make_batch(batch, rope, pad_id) for batch in batches]
        started = time.perf_counter()
        with PeakMemory(loss.device) as peak:
            totals = evaluate(loss, found)
        seconds = time.perf_counter() - started
        if not totals.targets:
            raise UserError(
                "data_path: its text has no target token; check the answer offsets, or raise max_branch_tokens"
            )
        mean = totals.loss / totals.targets
        lone = mean if lone is None else lone
        yield TaxPoint(
            branches=branches,
            mean_branches=totals.branches / sum(map(len, batches)),
            loss=mean,
            tax=mean - lone,
            targets=int(totals.targets),
            tokens=int(totals.tokens),
            seconds=seconds,
            tokens_per_second=totals.tokens / seconds,
            peak_extra_bytes=peak.max_bytes - at_rest,
        )
