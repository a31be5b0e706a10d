"""Parts of `benchmarks.scale`: overhead of a training step, and all-reduce between two processes."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import seconds
from benchmarks.learner import Learner
from parallelmind.config import RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.layout import Batch, Tokens
from parallelmind.training import checkpoint
from parallelmind.training.checkpoint import TrainingState


def cpu_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the minimum CPU time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Fit a line through (x, y) points and return its intercept and slope, each at least 0."""
    slope, intercept = np.polyfit([x for x, _ in points], [y for _, y in points], 1)
    return max(float(intercept), 0.0), max(float(slope), 0.0)


def _one_sample_batch(tokens: int, vocabulary: int) -> Batch:
    """Return a batch of one sample of four branches with `tokens` tokens in total."""
    branches = np.split(np.arange(tokens) % vocabulary, 4)
    return make_batch([Tokens.of([], [branch.tolist() for branch in branches])], RopeConfig(), 0)


def _step_seconds(learner: Learner, tokens: int, repeats: int) -> float:
    """Return the CPU time of a step, layout of the batch included, after one warm-up step."""
    vocabulary = learner.base.config.vocab_size

    def step() -> None:
        learner.step(_one_sample_batch(tokens, vocabulary))

    step()
    return cpu_seconds(step, repeats)


def stepping() -> dict[str, float]:
    """Measure the dispatch overhead of a step by number of layers, and SmolLM2's step on one core.

    `cpu_flops` is the FLOP/s of a large matrix product on the same core.
    """
    points = []
    for layers in (4, 24):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
        )
        learner = Learner(RopeConfig(), LlamaForCausalLM(config))
        points.append((float(layers), _step_seconds(learner, 16, 10)))
    base_s, layer_s = line(points)
    learner = Learner(RopeConfig())
    step_s = _step_seconds(learner, 256, 4)
    trained = sum(weight.numel() for weight in learner.model.parameters() if weight.requires_grad)
    square = torch.randn(2048, 2048)
    product_s = cpu_seconds(lambda: square @ square)
    snapshot_s = cpu_seconds(lambda: checkpoint.snapshot(learner.model, learner.optimizer, TrainingState("")))
    return {
        "dispatch_s": base_s,
        "dispatch_s_per_layer": layer_s,
        "checkpoint_s_per_byte": snapshot_s / (12 * trained),
        "cpu_step_s_per_token": step_s / 256,
        "cpu_flops": 2 * 2048**3 / product_s,
    }


def _reduce(rank: int, folder: str) -> None:
    """Time all-reduces of several sizes; rank 0 writes the costs."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    points = []
    for size in (1 << 10, 1 << 18, 1 << 22, 1 << 24):
        values = torch.ones(size // 4)
        dist.barrier()
        points.append((float(size), min(seconds(partial(dist.all_reduce, values)) for _ in range(8))))
    if rank == 0:
        costs = {"gloo_latency_s": points[0][1] / 2, "gloo_bytes_per_s": 1 / line(points)[1]}
        Path(folder, "costs.json").write_text(json.dumps(costs))
    dist.destroy_process_group()


def reducing() -> dict[str, float]:
    """Measure a gloo all-reduce of two processes on loopback: two messages, and every byte once."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_reduce, (folder,), nprocs=2)
        costs: dict[str, float] = json.loads(Path(folder, "costs.json").read_text())
    return costs
