"""`python -m benchmarks.step_memory gathered|full`: bytes that one step on 2 x 1,024 tokens takes at its peak."""

from __future__ import annotations

import gc
import sys
import threading

import psutil
import torch
import torch.nn.functional as F

from benchmarks.text import passages
from benchmarks.training import Learner
from parallelmind.config import RopeConfig
from parallelmind.data.grouping import make_batch
from parallelmind.layout import IGNORE, Tokens
from parallelmind.model.structure import causal_lm
from parallelmind.training.loss import decoder_inputs, to_tensors

_ROWS, _MAIN, _BRANCHES, _BRANCH = 2, 512, 8, 64


class Peak:
    """The most resident memory of this process while it runs, above what it was before."""

    def __enter__(self) -> Peak:
        gc.collect()
        self._process, self._over = psutil.Process(), threading.Event()
        self.before = self.most = self._process.memory_info().rss
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()


def main(kind: str) -> None:
    rope = RopeConfig(visibility="isolated")
    learner = Learner(rope)
    causal_lm(learner.model).activation_checkpointing_enable()
    ids = [token for text, _ in passages(40) for token in text]
    size = _MAIN + _BRANCHES * _BRANCH
    samples = []
    for row in range(_ROWS):
        own = ids[row * size : (row + 1) * size]
        samples.append(Tokens.of(own[:_MAIN], [own[at : at + _BRANCH] for at in range(_MAIN, size, _BRANCH)]))
    batch = make_batch(samples, rope, pad_id=0)
    tensors = to_tensors(batch)
    learner.step(
        make_batch([Tokens.of(ids[:8], [ids[8:16]])], rope, pad_id=0)
    )  # the weights are mapped, and read when first used
    with Peak() as peak:
        if kind == "gathered":
            learner.step(batch)
        else:
            logits = learner.model(**decoder_inputs(causal_lm(learner.model), tensors, rope.visibility)).logits.float()
            F.cross_entropy(logits.flatten(0, 1), tensors.labels.flatten(), ignore_index=IGNORE, reduction="sum").backward()
    print(peak.most - peak.before)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
