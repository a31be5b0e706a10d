"""`python -m benchmarks.step_memory gathered|full`: print the peak bytes of one step on 2 x 1,024 tokens."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from benchmarks.learner import Learner, long_samples
from parallelmind.config import RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.evaluation.peak_memory import PeakMemory, memory_in_use
from parallelmind.layout import IGNORE, Tokens
from parallelmind.model.inputs import decoder_inputs, to_tensors
from parallelmind.model.structure import causal_lm

_ROWS, _BRANCH = 2, 64


def main(kind: str) -> None:
    """`gathered`: the loss of target tokens only; `full`: float32 logits of all tokens."""
    rope = RopeConfig(visibility="isolated")
    learner = Learner(rope)
    causal_lm(learner.model).activation_checkpointing_enable()
    batch = make_batch(long_samples(_ROWS, _BRANCH), rope, pad_id=0)
    tensors = to_tensors(batch)
    small = Tokens.of(list(range(8)), [list(range(8, 16))])
    learner.step(make_batch([small], rope, pad_id=0))  # reads the memory-mapped weights
    before = memory_in_use()
    with PeakMemory() as peak:
        if kind == "gathered":
            learner.step(batch)
        else:
            logits = learner.model(
                **decoder_inputs(causal_lm(learner.model), tensors, rope.visibility)
            ).logits.float()
            F.cross_entropy(
                logits.flatten(0, 1),
                torch.from_numpy(batch.labels).flatten(),
                ignore_index=IGNORE,
                reduction="sum",
            ).backward()
    print(peak.max_bytes - before)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
