"""The nodes of a Ray cluster, with those that its autoscaler may add, and how processes share them.

A node is a mapping of resources to amounts, as `ray.nodes()` has it. This module needs no Ray.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from math import floor

from parallelmind.errors import UserError

GROWS_TO = "PARALLELMIND_GROWS_TO"
Node = Mapping[str, float]

_OLDER_THAN_AMPERE = ("K80", "P4", "P100", "T4", "V100")
_SMALLEST_SHARE = 0.01
_EXAMPLE = "8xCPU=8+4xCPU=8,GPU=1"


def all_nodes(alive: Iterable[Node]) -> list[Node]:
    """The nodes that are alive, and those that the autoscaler may add to them.

    Ray does not report what its autoscaler may add; $PARALLELMIND_GROWS_TO holds the largest number of every
    kind of node, as `8xCPU=8+4xCPU=8,GPU=1`. Raises UserError if that variable cannot be parsed.
    """
    nodes = list(alive)
    missing: list[Node] = []
    for count, kind in _planned():
        present = sum(
            all(node.get(name, 0.0) == kind.get(name, 0.0) for name in ("CPU", "GPU")) for node in nodes
        )
        missing += [kind] * (count - present)
    return nodes + missing


def total(nodes: Iterable[Node], resource: str) -> float:
    """Amount of a resource on all nodes together."""
    return sum(node.get(resource, 0.0) for node in nodes)


def cpu_share(nodes: Sequence[Node], processes: int) -> float:
    """Largest number of CPUs that every one of `processes` can have on one of the nodes."""
    cpus = [node["CPU"] for node in nodes if node.get("CPU")]
    sizes = {amount / part for amount in cpus for part in range(1, processes + 1)}
    fitting = [size for size in sizes if sum((amount + 1e-6) // size for amount in cpus) >= processes]
    return _rounded(max(fitting, default=1.0))


def cpu_share_per_gpu(nodes: Sequence[Node], processes: int) -> float:
    """As `cpu_share`, for processes that have a GPU each; the CPUs of a node are divided by its GPUs."""
    pairs = [(node.get("CPU", 0.0), node["GPU"]) for node in nodes if node.get("GPU")]
    sizes = {cpus / gpus for cpus, gpus in pairs if cpus}
    fitting = [
        size for size in sizes if sum(min((cpus + 1e-6) // size, gpus) for cpus, gpus in pairs) >= processes
    ]
    return _rounded(max(fitting, default=1.0))


def have_native_bfloat16(nodes: Iterable[Node]) -> bool:
    """Whether all GPUs compute bfloat16 in hardware, by the accelerator types that Ray reports."""
    older = {f"accelerator_type:{name}" for name in _OLDER_THAN_AMPERE}
    return not any(node.get("GPU") and older.intersection(node) for node in nodes)


def _rounded(share: float) -> float:
    """Whole CPUs, one per thread, and hundredths of a CPU below one."""
    return float(floor(share)) if share >= 1 else max(_SMALLEST_SHARE, floor(100 * share + 1e-6) / 100)


def _planned() -> list[tuple[int, Node]]:
    """Largest number and resources of every kind of node."""
    text = os.environ.get(GROWS_TO, "")
    try:
        kinds = [kind.split("x", 1) for kind in text.split("+") if kind]
        return [(int(count), _parse_resources(resources)) for count, resources in kinds]
    except ValueError as error:
        raise UserError(f"${GROWS_TO}={text}: not a list of nodes; write {_EXAMPLE}") from error


def _parse_resources(text: str) -> Node:
    pairs = [item.split("=") for item in text.split(",")]
    return {name: float(amount) for name, amount in pairs}
