"""How many runs and workers a cluster has room for, on nodes that exist and nodes that may be added."""

from __future__ import annotations

import autoscaling
import pytest

from parallelmind.errors import UserError
from workloads.common import resources


@pytest.mark.parametrize(
    ("grows_to", "resource", "expected"),
    [("", "CPU", 2), ("CPU=96,GPU=4", "CPU", 96), ("CPU=1,GPU=4", "CPU", 2)],
)
def test_capacity_counts_nodes_that_the_autoscaler_may_add(
    monkeypatch: pytest.MonkeyPatch, grows_to: str, resource: str, expected: float
) -> None:
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setenv(autoscaling.GROWS_TO, grows_to)
    assert resources.capacity(resource) == expected


def test_an_unreadable_list_of_resources_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autoscaling.GROWS_TO, "many")
    with pytest.raises(UserError, match=r"GROWS_TO=many: not a list of resources; write CPU=96,GPU=4"):
        resources.capacity("GPU")


def test_workers_share_the_cpus_that_the_cluster_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: {"CPU": 8.0})
    assert resources.cpus_per_worker(32) == 0.12
    monkeypatch.setenv(autoscaling.GROWS_TO, "CPU=96")
    assert resources.cpus_per_worker(96) == resources.cpus_per_worker(1) == 0.5
