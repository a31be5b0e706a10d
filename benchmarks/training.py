"""LoRA steps on SmolLM2: cost of the patch, the shared main, the loss, checkpoints and the platform."""

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
from torch._dynamo.utils import counters

from benchmarks import shard_memory
from benchmarks.harness import Bench, ratio, seconds
from benchmarks.learner import Learner, long_samples
from benchmarks.platform_speed import training_lines
from benchmarks.text import passages
from parallelmind.config import RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.evaluation.device_waits import count_waits
from parallelmind.layout import IGNORE, Batch, Tokens
from parallelmind.remote import RemotePath
from parallelmind.training import checkpoint
from parallelmind.training.checkpoint import TrainingState
from parallelmind.training.checkpoint_manager import CheckpointManager
from parallelmind.training.compilation import compile_layers, pad_to_bucket
from parallelmind.training.step import optimizer_step

_SAMPLES, _MAX_TOKENS, _BRANCH = 2, 512, 32
_DEFAULT_INTERVAL = 100  # steps between checkpoints


def _batch() -> Batch:
    samples = [
        (main[: _MAX_TOKENS // 2], [branch[:32] for branch in branches])
        for main, branches in passages(_SAMPLES)
    ]
    return make_batch([Tokens.of(main, branches) for main, branches in samples], RopeConfig(), pad_id=0)


def step_overhead() -> float:
    """Time of a patched step over time of an unpatched one: same weights, tokens, targets, optimizer."""
    batch = _batch()
    patched, plain = Learner(RopeConfig()), Learner(RopeConfig(patch_rope=False))
    ids, is_target = torch.from_numpy(batch.ids), torch.from_numpy(batch.labels) != IGNORE
    labels = torch.from_numpy(batch.labels)[is_target]

    def plain_step() -> float:
        hidden = plain.base.base_model(input_ids=ids, use_cache=False).last_hidden_state[is_target]
        logits = plain.base.get_output_embeddings()(hidden).float()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        return optimizer_step(plain.loss, plain.optimizer, len(labels), clip=1.0).item()

    return ratio(lambda: patched.step(batch), plain_step, repeats=7)


def shared_main() -> float:
    """Branches/s of one sample with eight branches over branches/s of eight rows of main and one branch."""
    rope = RopeConfig(visibility="isolated")
    learner = Learner(rope)
    sample = long_samples(1, _BRANCH)[0]
    main, *branches = torch.from_numpy(sample.ids).split(sample.lengths.tolist())
    rows = [Tokens.of(main.tolist(), [branch.tolist()]) for branch in branches]
    shared, separate = make_batch([sample], rope, pad_id=0), make_batch(rows, rope, pad_id=0)
    return ratio(lambda: learner.step(separate), lambda: learner.step(shared), repeats=3)


def peak_memory() -> float:
    """Peak memory of a step on 2 x 1,024 tokens over that of a step with float32 logits for every token."""
    return _peak("gathered") / _peak("full")


def _peak(kind: str) -> float:
    """Peak bytes of a step above the memory of the process before it, measured in a new process.

    MALLOC_MMAP_THRESHOLD_ makes glibc return freed blocks to the system, so resident memory is live memory.
    """
    command = [sys.executable, "-m", "benchmarks.step_memory", kind]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    completed = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return float(completed.stdout.split()[-1])


def save_cost() -> float:
    """Time that saving a checkpoint adds, over the time of all steps in the default checkpoint interval."""
    learner, batch = Learner(RopeConfig()), _batch()
    learner.step(batch)
    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(RemotePath(Path(folder)), 2)
        numbers = iter(range(100))

        def saving() -> None:
            manager.save(
                checkpoint.snapshot(learner.model, learner.optimizer, TrainingState("", step=next(numbers)))
            )
            learner.step(batch)
            learner.step(batch)

        def stepping() -> None:
            learner.step(batch)
            learner.step(batch)

        pairs = [(seconds(saving), seconds(stepping)) for _ in range(5)]
        manager.close()
    plain = median(without for _, without in pairs)
    return median(with_save - without for with_save, without in pairs) / (plain / 2 * _DEFAULT_INTERVAL)


def platform_speed() -> float:
    """Tokens/s of `workloads.train` after its start-up over tokens/s of a bare loop on the same batches."""
    return _run("platform") / _run("bare")


def _run(kind: str) -> float:
    completed = subprocess.run(
        [sys.executable, "-m", "benchmarks.platform_speed", kind], capture_output=True, text=True, check=True
    )
    return float(completed.stdout.split()[-1])


def first_step() -> float:
    """Seconds from the start of the command to the log line of step 1, with a cached model."""
    start = time.perf_counter()
    times = [
        time.perf_counter() - start for line in training_lines(max_steps=1) if line.startswith("step 1/")
    ]
    return times[0]


def waits() -> float:
    """Waits of the host for the device in a logged step, counted on a device that stands in for it."""
    learner = Learner(RopeConfig())
    learner.model.to("meta")
    with count_waits() as names:
        learner.step(_batch(), _batch())
    return len(names)


def recompiles() -> float:
    """Layers that are compiled after the first batch of every shape, over lengths of several buckets."""
    learner = Learner(RopeConfig())
    compile_layers(learner.model)
    lengths = [60, 88, 110, 140, 180, 250, 61, 120, 75, 200, 130, 88]
    main, *branches = long_samples(1, _BRANCH)[0].split()[:3]
    samples = [Tokens.of(main[:length], branches) for length in lengths]
    shapes = [pad_to_bucket(make_batch([sample], RopeConfig(), pad_id=0)) for sample in samples]
    seen = {batch.ids.shape: batch for batch in shapes}
    assert len(seen) >= 3, list(seen)
    for batch in seen.values():
        learner.step(batch)
    before = counters["stats"]["unique_graphs"]
    for batch in shapes:
        learner.step(batch)
    return counters["stats"]["unique_graphs"] - before


def _bench(name: str, target: float, better: str, measure: Callable[[], float], unit: str = "ratio") -> Bench:
    return Bench(f"training.{name}", target, better, unit, measure)  # type: ignore[arg-type]


BENCHES = [
    _bench("step_vs_plain", 1.05, "lower", step_overhead),
    _bench("shared_main_vs_rows", 4.0, "higher", shared_main),
    _bench("memory_vs_full_logits", 0.60, "lower", peak_memory),
    _bench("save_share", 0.02, "lower", save_cost),
    _bench("platform_vs_bare_loop", 0.95, "higher", platform_speed),
    _bench("load_peak_rank", 0.35, "lower", lambda: shard_memory.shares()[0]),
    _bench("fsdp_memory_4ranks", 0.35, "lower", lambda: shard_memory.shares()[1]),
    _bench("seconds_to_first_step", 30.0, "lower", first_step, "s"),
    _bench("syncs_per_step", 1.0, "lower", waits, "waits"),
    _bench("recompiles_after_warmup", 0.0, "lower", recompiles, "graphs"),
]
