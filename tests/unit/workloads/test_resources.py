"""How runs and workers divide a cluster, on nodes that exist and nodes that may be added."""

from __future__ import annotations

from typing import Any

import autoscaling
import pytest

from benchmarks.node_packing import nodes_started
from parallelmind.cluster_nodes import GROWS_TO, all_nodes, have_native_bfloat16
from parallelmind.errors import UserError
from workloads.common import resources

DOCUMENTED = autoscaling.grows_to(autoscaling.prepared_config())


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The resources of the nodes that are alive, to be filled by the test."""
    nodes: list[dict[str, float]] = []
    monkeypatch.setattr(
        resources.ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes]
    )
    monkeypatch.delenv(GROWS_TO, raising=False)
    return nodes


@pytest.mark.parametrize(
    ("grows_to", "resource", "expected"),
    [
        ("", "CPU", 2),
        ("8xCPU=8+4xCPU=8,GPU=1", "CPU", 98),
        ("8xCPU=8+4xCPU=8,GPU=1", "GPU", 4),
        ("3xCPU=2", "CPU", 6),  # one of the three is alive
    ],
)
def test_capacity_counts_nodes_that_the_autoscaler_may_add(
    monkeypatch: pytest.MonkeyPatch,
    alive: list[dict[str, float]],
    grows_to: str,
    resource: str,
    expected: float,
) -> None:
    alive += [{"memory": 9.0}, {"CPU": 2.0, "memory": 9.0}]
    monkeypatch.setenv(GROWS_TO, grows_to)
    assert resources.capacity(resource) == expected


@pytest.mark.parametrize("grows_to", ["many", "CPU=96,GPU=4", "2xCPU"])
def test_an_unreadable_list_of_nodes_is_a_user_error(monkeypatch: pytest.MonkeyPatch, grows_to: str) -> None:
    monkeypatch.setenv(GROWS_TO, grows_to)
    with pytest.raises(UserError, match=f"GROWS_TO={grows_to}: not a list of nodes; write 8xCPU=8"):
        all_nodes([])


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"),
    [
        ([2], 1, 2),
        ([2], 2, 1),
        ([1], 2, 0.5),
        ([2], 3, 0.66),
        ([1], 10, 0.1),
        ([1, 1], 2, 1),
        ([0, 1, 1], 2, 1),
        ([8, 8], 2, 8),
        ([8, 8], 3, 4),
        ([8], 3, 2),  # whole CPUs, as threads are
        ([1, 4, 4], 2, 4),
        ([8] * 12, 8, 8),
    ],
)
def test_a_worker_reserves_its_share_of_a_node(
    alive: list[dict[str, float]], nodes: list[float], workers: int, cpus: float
) -> None:
    alive += [{"CPU": float(amount)} for amount in nodes]
    assert resources.cpus_per_worker(workers, use_gpu=False) == cpus


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"),
    [
        ([(8, 1)] * 4, 4, 8),
        ([(64, 8)], 1, 8),
        ([(64, 8)], 8, 8),
        ([(64, 8), (8, 1)], 9, 8),
        ([(2, 4)], 4, 0.5),
    ],
)
def test_a_worker_on_a_gpu_reserves_the_cpus_of_that_gpu(
    alive: list[dict[str, float]], nodes: list[tuple[float, float]], workers: int, cpus: float
) -> None:
    alive += [{"CPU": float(number), "GPU": float(gpus)} for number, gpus in nodes] + [{"CPU": 96.0}]
    assert resources.cpus_per_worker(workers, use_gpu=True) == cpus


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ({"CPU": 8.0, "GPU": 2.0}, None),
        ({"CPU": 7.9999999, "GPU": 2.0}, None),
        ({"CPU": 3.0, "GPU": 2.0}, "8 CPUs (3 free)"),
        ({"CPU": 8.0}, "2 GPUs (0 free)"),
        ({"CPU": 0.5, "GPU": 1.0}, "8 CPUs (0.5 free) and 2 GPUs (1 free)"),
    ],
)
def test_a_run_tells_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, free: dict[str, float], expected: str | None
) -> None:
    monkeypatch.setattr(resources.ray, "available_resources", lambda: free)
    assert resources.shortage(2, 4, use_gpu=True) == expected


@pytest.mark.parametrize("cpus_per_trial", [1, 2, 3, 8])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_trial_and_its_driver_fit_its_cpus(cpus_per_trial: int, workers: int) -> None:
    reserved = resources.cpus_per_trial_worker(cpus_per_trial, workers)
    assert 0 < workers * reserved + resources.TRIAL_DRIVER_CPUS <= cpus_per_trial + 1e-9
    if cpus_per_trial >= workers:
        assert workers * round(reserved) <= cpus_per_trial


@pytest.mark.parametrize(
    ("workers", "use_gpu", "expected"),
    [
        (1, False, {"data_worker": 1}),
        (8, False, {"data_worker": 8}),
        (12, False, {"data_worker": 8, "gpu_worker": 4}),
        (16, False, {"data_worker": 8}),
        (1, True, {"gpu_worker": 1}),
        (4, True, {"gpu_worker": 4}),
    ],
)
def test_training_brings_a_node_of_the_documented_cluster_for_each_worker(
    monkeypatch: pytest.MonkeyPatch, alive: list[dict[str, float]], workers: int, use_gpu: bool, expected: Any
) -> None:
    monkeypatch.setenv(GROWS_TO, DOCUMENTED)
    bundle = {"CPU": resources.cpus_per_worker(workers, use_gpu), "GPU": float(use_gpu)}
    assert nodes_started([[bundle] * workers]) == expected


@pytest.mark.parametrize(("cpus_per_trial", "nodes"), [(1, 2), (2, 3), (4, 6), (7, 12), (8, 12)])
def test_the_trials_of_a_sweep_fill_the_nodes_that_they_bring(cpus_per_trial: int, nodes: int) -> None:
    driver = [{"CPU": resources.TRIAL_DRIVER_CPUS}]
    worker = [{"CPU": resources.cpus_per_trial_worker(cpus_per_trial, workers=1)}]
    assert nodes_started([driver] * 12 + [worker] * 12) == {
        "data_worker": min(nodes, 8),
        **({"gpu_worker": nodes - 8} if nodes > 8 else {}),
    }


def test_bfloat16_is_chosen_by_the_type_of_the_gpus() -> None:
    ampere, turing = {"GPU": 1.0, "accelerator_type:A100": 1.0}, {"GPU": 1.0, "accelerator_type:T4": 1.0}
    assert have_native_bfloat16([{"CPU": 8.0}, ampere, {"GPU": 1.0}])
    assert not have_native_bfloat16([ampere, turing])
