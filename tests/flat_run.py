"""Tokenise, batch and train on flat records, and write every array of it to an npz file.

Usage: python -P flat_run.py LINES.jsonl OUTPUT.npz. It runs on this code and on that of earlier commits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import looping
import numpy as np
import torch
from safetensors.torch import save
from tiny import tiny_tokenizer

from parallelmind.config import DataConfig
from parallelmind.data.files import file_parts
from parallelmind.data.packing import EpochSeed, TokenRecord, sample_batches
from parallelmind.data.tokenise import tokenise_part
from parallelmind.training.loss import TargetLoss
from parallelmind.training.step import evaluate

LIMITS: list[dict[str, Any]] = [
    {},
    {"max_branch_tokens": 12, "max_sample_tokens": 30, "max_branches_per_sample": 3},
    {"max_branch_tokens": 12, "overlong": "keep_answer", "truncate_side": "left", "batch_tokens": 200},
    {"max_branch_tokens": 12, "overlong": "skip", "random_time_offset": 4, "batch_by_samples": False},
]
ROPES: list[dict[str, Any]] = [
    {"visibility": "columnar"},
    {"visibility": "isolated"},
    {"visibility": "columnar", "align_to": "right", "positions": "flat"},
]

Arrays = Iterator[tuple[str, Any]]


def tokenised(source: str, settings: dict[str, Any]) -> tuple[list[TokenRecord], list[tuple[str, Any]]]:
    """The records as training reads them, and the arrays of them."""
    data = DataConfig.model_validate({"data_path": source, **settings})
    records = [
        record for part in file_parts([source]) for record in tokenise_part(part, tiny_tokenizer(), data)
    ]
    arrays = [("counts", [[record.standalone, record.truncated, record.skipped] for record in records])]
    kept = [record for item in records for record in item.for_packing()]
    for name in ("ids", "lengths", "targets"):
        arrays.append((name, np.concatenate([getattr(record.tokens, name) for record in kept])))
    return kept, arrays


def batches(records: list[TokenRecord], **settings: Any) -> Arrays:
    """The arrays of all batches of an epoch, and the loss of the first ones on a random adapter.

    `Batch.segment` was `Batch.sequence` in earlier commits.
    """
    config = looping.config(**settings)
    model = looping.fresh_model(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    loss = TargetLoss(model, config.rope.visibility)
    for number, group in enumerate(sample_batches(records, config.data, EpochSeed(0))):
        batch = group.collate(config.rope, 0)
        yield f"{number} segment", batch.segment if hasattr(batch, "segment") else batch.sequence
        for name in ("ids", "pos2d", "position", "labels"):
            yield f"{number} {name}", getattr(batch, name)
        if number < 6:
            totals = evaluate(loss, [batch])
            yield f"{number} totals", [totals.loss, totals.targets, totals.tokens, totals.branches]


def adapter(records: list[TokenRecord], **settings: Any) -> bytes:
    """The weights of an adapter after a short training, in the bytes of safetensors."""
    looping.ROWS = records
    with TemporaryDirectory() as folder:
        run = looping.run(looping.config(max_steps=4, **settings), Path(folder))
    return save({name: value.contiguous() for name, value in run.weights.items()})


def everything(source: str) -> Arrays:
    for settings in LIMITS:
        records, arrays = tokenised(source, settings)
        yield from ((f"{settings} {name}", array) for name, array in arrays)
        for rope in ROPES:
            found = batches(records, **settings, **rope, branches_per_sample=None)
            yield from ((f"{settings} {rope} {name}", array) for name, array in found)
    records, _ = tokenised(source, {})
    for rope in ROPES[:2]:
        yield f"{rope} adapter", np.frombuffer(adapter(records[:40], **rope), np.uint8)


if __name__ == "__main__":
    source, output = sys.argv[1:]
    np.savez(output, **dict(everything(source)))
