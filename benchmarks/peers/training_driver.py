"""This project's training loop with LoRA. Arguments: dtype, file with a `TrainingWork`.

Prints the seconds of the second of two epochs; the first one warms up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping

from benchmarks.peers.training_work import TrainingWork, read_work
from parallelmind.config import TrainConfig
from parallelmind.data.packing import EpochSeed, TokenRecord, sample_batches
from parallelmind.layout import Batch, Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.base_model import load_base
from parallelmind.model.patch import patch
from parallelmind.training.loop import TrainingInputs, train


class _Quiet:
    """Hooks that log nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def print_line(self, line: str) -> None: ...
    def report(self, metrics: Mapping[str, float], step: int) -> None: ...
    def should_stop(self) -> bool:
        return False


def run(dtype: str, work: TrainingWork) -> float:
    """Train two epochs; return the seconds of the second one."""
    fields = {"packing": True, "batch_tokens": work.packed_tokens} if work.packed_tokens else {}
    config = TrainConfig.model_validate(
        {"data_path": "-", "dtype": dtype, "visibility": "isolated", "epochs": 2, **fields}
        | {"batch_size": work.batch_samples}
    )
    records = [TokenRecord(Tokens.of(*sample), standalone=False) for sample in work.samples]
    model, _ = load_base(config.model)
    patch(model, config.rope)
    adapted = add_lora(model, config.lora, config.optimizer.seed)
    starts = [0.0, 0.0]

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        starts[epoch] = time.perf_counter()
        seed = EpochSeed(config.optimizer.seed, epoch)
        for samples in sample_batches(records, config.data, seed):
            yield samples.collate(config.rope, 0, config.data.packing)

    train(TrainingInputs(config, "", adapted, batches, _Quiet(), batches_per_epoch=1, validation={}))
    return time.perf_counter() - starts[1]


if __name__ == "__main__":
    print(run(sys.argv[1], read_work(sys.argv[2])))
