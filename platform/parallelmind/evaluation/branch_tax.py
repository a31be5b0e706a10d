"""Branch tax: the loss at N branches per sample minus the loss at one branch, on the same text."""

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
from parallelmind.model.patch_state import is_patched, rope_config
from parallelmind.model.structure import causal_lm
from parallelmind.training.loss import TargetLoss
from parallelmind.training.step import evaluate

SampleBatches = Sequence[Sequence[Tokens]]  # batches of samples


@dataclass(frozen=True, slots=True)
class TaxPoint:
    """Measurements at one branch count.

    branches: the branch count. mean_branches: mean over the samples; the last samples of a record may have
    fewer branches. loss: nats per target token. tax: `loss` minus the loss at one branch. targets: target
    tokens. tokens: tokens read, main counted in each sample that repeats it. seconds: wall-clock time.
    peak_extra_bytes: peak memory above that of the loaded model.
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


def max_branches(batches: SampleBatches) -> int:
    """Number of branches of the largest sample."""
    return max((sample.branches for batch in batches for sample in batch), default=0)


def tax_curve(model: Model, batches_by_count: Mapping[int, SampleBatches], pad_id: int) -> Iterator[TaxPoint]:
    """Measure loss, speed and memory at every branch count, in ascending order.

    batches_by_count: the batches of the same text for each branch count; must contain 1. The loss is computed
    as in validation during training. Raises UserError if the text has no target token.
    """
    rope = rope_config(model) if is_patched(model) else RopeConfig(patch_rope=False)
    loss_module = TargetLoss(model, rope.visibility, causal_lm(model).dtype).eval()
    warmup = [make_batch(batch[:1], rope, pad_id) for batch in batches_by_count[1][:1]]
    evaluate(loss_module, warmup)  # weights are read from disk at their first use
    bytes_before, single_branch_loss = memory_in_use(loss_module.device), None
    for branches, sample_batches in sorted(batches_by_count.items()):
        batches = [make_batch(batch, rope, pad_id) for batch in sample_batches]
        started = time.perf_counter()
        with PeakMemory(loss_module.device) as peak:
            totals = evaluate(loss_module, batches)
        seconds = time.perf_counter() - started
        if not totals.targets:
            raise UserError(
                "data_path: its text has no target token; "
                "check the answer offsets, or raise max_branch_tokens"
            )
        loss = totals.loss / totals.targets
        single_branch_loss = loss if single_branch_loss is None else single_branch_loss
        yield TaxPoint(
            branches=branches,
            mean_branches=totals.branches / sum(map(len, sample_batches)),
            loss=loss,
            tax=loss - single_branch_loss,
            targets=int(totals.targets),
            tokens=int(totals.tokens),
            seconds=seconds,
            tokens_per_second=totals.tokens / seconds,
            peak_extra_bytes=peak.max_bytes - bytes_before,
        )
