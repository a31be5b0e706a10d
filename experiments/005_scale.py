"""What saturates first between 1 and 256 GPUs?

    XQUAD=path/to/xquad.en.json python -m benchmarks.scale    measure the cost of a batch in each part
    python -m experiments.005_scale [key=value …]             print the table

Without overrides the second command also writes results/005_scale.csv and .png.

Model of a step: every worker lays out its batch, computes, and all-reduces its gradients, without overlap.
One process, the batch server, makes the batches of all workers, a few ahead. Steps are simulated with
batches of unequal size and GPUs of unequal speed.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from experiments._scale_figure import figure
from parallelmind.cli import parse, print_help, run, wants_help
from parallelmind.config import FrozenConfig, LoraConfig

RESULTS = Path(__file__).resolve().parent / "results"
WORKERS = tuple(2**k for k in range(9))
_AHEAD = 5  # batches queued per worker: four in the batch server, one in transit
_EVERY = 100  # steps between checkpoints, and between validations
_VALIDATION_TOKENS = 3 * 32 * 512  # maximum with default settings
_ID_BYTES = 8  # of a token id sent from the batch server to a worker


class Inputs(FrozenConfig):
    """Assumptions: hardware figures that were not measured."""

    gpu_flops: float = Field(
        989e12, gt=0, description="dense bfloat16 FLOP/s of a GPU; default: data sheet of H100 and H200"
    )
    mfu: float = Field(
        0.4, gt=0, le=1, description="share of gpu_flops that the matrix products of a step reach"
    )
    sigma: float = Field(
        0.03, ge=0, description="standard deviation of the logarithm of a GPU's step time, for equal batches"
    )
    node_gpus: int = Field(8, ge=1, description="GPUs per node")
    node_cores: int = Field(
        96,
        ge=9,
        description="CPU cores per node; each worker uses one core, the batch server one core of the cluster",
    )
    nvlink: float = Field(450e9, gt=0, description="bytes/s between the GPUs of a node")
    infiniband: float = Field(50e9, gt=0, description="bytes/s of each GPU to other nodes: 400 Gbit/s")
    ethernet: float = Field(
        1.5625e9, gt=0, description="the same with one 100 Gbit/s link shared by the eight GPUs of a node"
    )
    hop: float = Field(
        5e-6,
        ge=0,
        description="latency in seconds between neighbours in the ring; Ethernet: ten times as much",
    )
    storage: float = Field(10e9, gt=0, description="bytes/s of the storage that all nodes read")
    batch_server_link: float = Field(
        12.5e9, gt=0, description="bytes/s out of the batch server's node, and the same into it"
    )
    part_bytes: int = Field(
        1 << 26,
        ge=1,
        description="bytes read by one task; default: what the platform uses from 1 TiB of text on",
    )
    corpus: float = Field(10e12, gt=0, description="size of the text in bytes")
    seed: int = Field(0, ge=0, description="seed of the simulation")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama or Qwen model. `keys`: width of the key and of the value projection."""

    hidden: int
    inner: int
    layers: int
    keys: int
    vocabulary: int

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Return (in, out) widths of every linear layer of a block."""
        h, i, k = self.hidden, self.inner, self.keys
        return [(h, h), (h, k), (h, k), (h, h), (h, i), (h, i), (i, h)]

    def trained(self, rank: int) -> int:
        """Return the number of LoRA weights."""
        return self.layers * rank * sum(a + b for a, b in self.linear)

    def flops(self, rank: int, seen: float) -> float:
        """FLOPs per token: 4 per frozen weight, 6 per trained weight, 12 per visible token and width.

        `seen`: visible tokens per token. Recomputation is not counted.
        """
        frozen = self.layers * sum(a * b for a, b in self.linear) + self.vocabulary * self.hidden
        return 4 * frozen + 6 * self.trained(rank) + 12 * self.layers * self.hidden * seen


SHAPES = {
    "135M": Shape(576, 1536, 30, 192, 49152),
    "0.5B": Shape(896, 4864, 24, 128, 151936),
    "1.5B": Shape(1536, 8960, 28, 256, 151936),
    "7B": Shape(3584, 18944, 28, 512, 152064),
}


def ring(workers: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of `size` bytes: reduce-scatter and all-gather of workers - 1 messages."""
    return 2 * (workers - 1) * (latency + size / workers / bandwidth)


def expected_max(count: int, sigma: float) -> float:
    """Expected maximum of `count` lognormal draws with median 1, by integrating the quantile function."""
    middles = (np.arange(20000) + 0.5) / 20000
    return float(np.mean([math.exp(sigma * NormalDist().inv_cdf(u)) for u in middles ** (1 / count)]))


def parts(
    shape: Shape, workers: int, fabric: str, given: Inputs, cost: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds per step of each part: first those of one worker, then those that feed all workers."""
    rank = LoraConfig().lora_rank
    size, tokens = (
        shape.trained(rank),
        cost["tokens"] * float(np.mean(cost["places"])) * (1 - cost["padding_share"]),
    )
    speed = given.gpu_flops * given.mfu / shape.flops(rank, cost["seen_per_token"])
    near = workers <= given.node_gpus
    wire = given.nvlink if near else getattr(given, fabric)
    hop = given.hop * (10 if fabric == "ethernet" and not near else 1)
    nodes = math.ceil(workers / given.node_gpus)
    cores = nodes * given.node_cores - workers - 1
    kept = (
        12 * size * cost["checkpoint_s_per_byte"]
        + 2 * cost["report_s"]
        + _VALIDATION_TOKENS / 3 / speed / workers
    )
    text = workers * tokens * cost["bytes_per_token"]
    return {
        "compute": cost["tokens"] * float(np.mean(cost["places"])) / speed,
        "dispatch": cost["dispatch_s"] + shape.layers * cost["dispatch_s_per_layer"],
        "layout": tokens * cost["layout_s_per_token"],
        "all-reduce": ring(workers, 4 * size, hop, wire) + ring(workers, 56, hop, wire),
        "checkpoints": kept / _EVERY,
        "batch server": workers
        * (cost["batch_server_s_per_batch"] + tokens * cost["batch_server_s_per_token"])
        + text / given.part_bytes * cost["task_s"],
        "readers": workers * tokens * cost["tokenise_s_per_token"] / cores,
        "storage": text / given.storage,
        "batch server's link": workers
        * tokens
        * max(cost["arrow_bytes_per_token"], _ID_BYTES)
        / given.batch_server_link,
    }


SOURCES = ("batch server", "readers", "storage", "batch server's link")


def simulate(
    workers: int,
    part: Mapping[str, float],
    source: float,
    places: NDArray[Any],
    sigma: float,
    seed: int,
    steps: int = 400,
) -> float:
    """Return the mean seconds of a step.

    Args:
        workers: Number of GPUs.
        part: Seconds of each part of a worker, from `parts`.
        source: Seconds from one batch to the next in the batch server.
        places: Quantiles of the size of a batch.
        sigma: Spread of compute time.
        seed: Seed of the draws.
        steps: Number of steps; the first quarter is warm-up and not counted.
    """
    rng, warm_up = np.random.default_rng(seed), steps // 4
    order, grid = np.arange(workers), np.linspace(0, 1, len(places))
    taken, ends, made = [np.zeros(workers)] * _AHEAD, [0.0], 0.0
    for _ in range(steps):
        size = np.interp(rng.random(workers), grid, places) / places.mean()
        compute_s = np.maximum(part["compute"] * size, part["dispatch"]) * np.exp(
            sigma * rng.standard_normal(workers)
        )
        # The batch server makes one batch at a time, and only for a worker with room in its queue.
        ready = (
            np.maximum.accumulate(np.maximum(taken[-_AHEAD] - order * source, made)) + (order + 1) * source
        )
        made = float(ready[-1])
        taken.append(np.maximum(ready, ends[-1]))
        ends.append(
            float((taken[-1] + part["layout"] + compute_s).max()) + part["all-reduce"] + part["checkpoints"]
        )
    return (ends[-1] - ends[warm_up]) / (steps - warm_up)


def row(name: str, workers: int, fabric: str, given: Inputs, cost: Mapping[str, Any]) -> dict[str, Any]:
    """Return one line of the table: throughput, limit and parts for a model on `workers` GPUs."""
    part, places = parts(SHAPES[name], workers, fabric, given, cost), np.array(cost["places"])
    source = max(SOURCES, key=lambda item: part[item])
    unlimited = simulate(workers, part, 0.0, places, given.sigma, given.seed)
    step = simulate(workers, part, part[source] / workers, places, given.sigma, given.seed)
    own = ("compute", "dispatch", "layout", "all-reduce", "checkpoints")
    straggling = max(
        0.0, unlimited - max(part["compute"], part["dispatch"]) - sum(part[item] for item in own[2:])
    )
    shown = {
        **{item: part[item] for item in own},
        "stragglers": straggling,
        **{item: part[item] for item in SOURCES},
    }
    limit = source if part[source] >= unlimited else max((*own, "stragglers"), key=lambda item: shown[item])
    tokens = cost["tokens"] * float(places.mean()) * (1 - cost["padding_share"])
    rate = workers * tokens / step
    return {
        "model": name,
        "gpus": workers,
        "fabric": fabric,
        "limit": limit,
        "tokens_per_s": round(rate),
        "efficiency": round(part["compute"] / step, 3),
        "reader_cores": math.ceil(rate * cost["tokenise_s_per_token"]),
        "read_mb_per_s": round(rate * cost["bytes_per_token"] / 1e6, 1),
        "corpus_hours": round(given.corpus / cost["bytes_per_token"] / rate / 3600, 1),
        **{f"{item} ms".replace(" ", "_"): round(value * 1e3, 3) for item, value in shown.items()},
    }


def survey_hours(nodes: int, given: Inputs, cost: Mapping[str, Any]) -> dict[str, float]:
    """Hours of the survey (it reads all lines before training) if cores, planning or storage limit it."""
    return {
        "cores": given.corpus * cost["survey_s_per_byte"] / (nodes * given.node_cores) / 3600,
        "tasks": given.corpus / given.part_bytes * cost["task_s"] / 3600,
        "storage": given.corpus / given.storage / 3600,
    }


def record(rows: list[dict[str, Any]]) -> None:
    """Write the table and the figure to results/."""
    with (RESULTS / "005_scale.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    figure(rows).savefig(RESULTS / "005_scale.png", dpi=120)


def main(argv: list[str]) -> None:
    """Print the table; without overrides also record it."""
    if wants_help(argv):
        print_help(__doc__ or "", Inputs)
        return
    given = parse(Inputs, argv)
    cost = json.loads((RESULTS / "005_scale.costs.json").read_text(encoding="utf-8"))
    rows = [
        row(name, n, fabric, given, cost)
        for fabric in ("infiniband", "ethernet")
        for name in SHAPES
        for n in WORKERS
    ]
    if not argv:
        record(rows)
    for item in rows:
        print("| " + " | ".join(str(value) for value in list(item.values())[:9]) + " |")
    for nodes in (1, 8, 32):
        hours = ", ".join(f"{name} {value:.1f}" for name, value in survey_hours(nodes, given, cost).items())
        print(f"hours of the survey on {nodes} nodes: {hours}")


if __name__ == "__main__":
    run(main)
