"""LoRA steps on SmolLM2: what the patch, the shared main, the gathered loss, checkpoints and the platform
around it cost.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness import Bench, ratio, seconds
from benchmarks.text import passages
from parallelmind.config import LoraConfig, ModelConfig, OptimizerConfig, RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.layout import IGNORE, Batch, Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.base_model import load_base
from parallelmind.model.patch import patch
from parallelmind.remote import RemoteDir
from parallelmind.training import checkpoint
from parallelmind.training.checkpoint import CheckpointManager, State
from parallelmind.training.loss import TargetLoss
from parallelmind.training.step import accumulate_gradients, make_optimizer, optimizer_step

_SAMPLES, _LONGEST, _MAIN, _BRANCH = 2, 512, 512, 32
_DEFAULT_INTERVAL = 100  # steps between checkpoints


class Learner:
    """SmolLM2 with a fresh adapter, and a step on a batch."""

    def __init__(self, rope: RopeConfig) -> None:
        self.base, _ = load_base(ModelConfig())
        if rope.patch_rope:
            patch(self.base, rope)
        self.model = add_lora(self.base, LoraConfig(), seed=0)
        self.loss = TargetLoss(self.model, rope.visibility).train()
        self.optimizer = make_optimizer(self.model, OptimizerConfig())

    def step(self, *batches: Batch) -> float:
        totals = accumulate_gradients(self.loss, iter(batches), len(batches))
        return optimizer_step(self.loss, self.optimizer, totals.targets, clip=1.0)


def long_samples(count: int, branch: int) -> list[Tokens]:
    """Samples of a 512-token main and eight branches of so many tokens, from as many passages as it takes."""
    ids = [token for main, _ in passages(20 * count) for token in main]
    size = _MAIN + 8 * branch
    samples = []
    for first in range(0, count * size, size):
        own = ids[first : first + size]
        samples.append(Tokens.of(own[:_MAIN], [own[at : at + branch] for at in range(_MAIN, size, branch)]))
    return samples


def _batch() -> Batch:
    samples = [
        (main[: _LONGEST // 2], [branch[:32] for branch in branches]) for main, branches in passages(_SAMPLES)
    ]
    return make_batch([Tokens.of(main, branches) for main, branches in samples], RopeConfig(), pad_id=0)


def step_overhead() -> float:
    """Time of the patched step over time of the plain one: same weights, tokens, targets and optimizer."""
    batch = _batch()
    patched, plain = Learner(RopeConfig()), Learner(RopeConfig(patch_rope=False))
    ids, wanted = torch.from_numpy(batch.ids), torch.from_numpy(batch.labels) != IGNORE
    labels = torch.from_numpy(batch.labels)[wanted]

    def plain_step() -> float:
        hidden = plain.base.base_model(input_ids=ids, use_cache=False).last_hidden_state[wanted]
        logits = plain.base.get_output_embeddings()(hidden).float()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        return optimizer_step(plain.loss, plain.optimizer, len(labels), clip=1.0)

    return ratio(lambda: patched.step(batch), plain_step, repeats=7)


def shared_main() -> float:
    """Branches a second of one sample of eight branches, over those of eight rows that each hold main and one
    branch.
    """
    rope = RopeConfig(visibility="isolated")
    learner = Learner(rope)
    sample = long_samples(1, _BRANCH)[0]
    main, *branches = torch.from_numpy(sample.ids).split(sample.lengths.tolist())
    rows = [Tokens.of(main.tolist(), [branch.tolist()]) for branch in branches]
    together, apart = make_batch([sample], rope, pad_id=0), make_batch(rows, rope, pad_id=0)
    return ratio(lambda: learner.step(apart), lambda: learner.step(together), repeats=3)


def peak_memory() -> float:
    """Peak of a step on 2 x 1,024 tokens over that of the same step with float32 logits for every token, in
    own processes.
    """
    return _peak("gathered") / _peak("full")


def _peak(kind: str) -> float:
    """Bytes that a step takes at its peak beyond what the process holds before it.

    glibc keeps freed blocks of megabytes in its heap, full of holes; here they go back, so resident is what
    is alive.
    """
    command = [sys.executable, "-m", "benchmarks.step_memory", kind]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return float(done.stdout.split()[-1])


def save_cost() -> float:
    """What a checkpoint adds to the steps around it, as a share of all steps from one to the next at the
    default interval.
    """
    learner, batch = Learner(RopeConfig()), _batch()
    learner.step(batch)
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointManager(RemoteDir(Path(folder)), 2)
        numbers = iter(range(100))

        def saving() -> None:
            store.save(checkpoint.snapshot(learner.model, learner.optimizer, State("", step=next(numbers))))
            learner.step(batch)
            learner.step(batch)

        def stepping() -> None:
            learner.step(batch)
            learner.step(batch)

        pairs = [(seconds(saving), seconds(stepping)) for _ in range(5)]
        store.close()
    plain = median(without for _, without in pairs)
    return median(with_save - without for with_save, without in pairs) / (plain / 2 * _DEFAULT_INTERVAL)


def platform_speed() -> float:
    """Tokens/s of `workloads.train` after its start-up, over those of a bare loop on the same batches."""
    return _run("platform") / _run("bare")


def _run(kind: str) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.platform_speed", kind], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def first_step() -> float:
    """Seconds from the command to the line of the first step, with the model in the cache."""
    from benchmarks.platform_speed import training_lines

    start = time.perf_counter()
    times = [
        time.perf_counter() - start for line in training_lines(max_steps=1) if line.startswith("step 1/")
    ]
    return times[0]


def _bench(name: str, target: float, better: str, measure: Callable[[], float], unit: str = "ratio") -> Bench:
    return Bench(f"training.{name}", target, better, unit, measure)  # type: ignore[arg-type]


BENCHES = [
    _bench("step_vs_plain", 1.05, "lower", step_overhead),
    _bench("shared_main_vs_rows", 4.0, "higher", shared_main),
    _bench("memory_vs_full_logits", 0.60, "lower", peak_memory),
    _bench("save_share", 0.02, "lower", save_cost),
    _bench("platform_vs_bare_loop", 0.95, "higher", platform_speed),
    _bench("seconds_to_first_step", 20.0, "lower", first_step, "s"),
]
