"""What a job counts on, on a cluster whose nodes come when they are asked for."""

from __future__ import annotations

import autoscaling
import pytest

from parallelmind.errors import UserError
from workloads.common import cluster


@pytest.mark.parametrize(
    ("grows", "resource", "most"), [("", "CPU", 2), ("CPU=96,GPU=4", "CPU", 96), ("CPU=1,GPU=4", "CPU", 2)]
)
def test_a_job_counts_on_nodes_that_may_come(
    monkeypatch: pytest.MonkeyPatch, grows: str, resource: str, most: float
) -> None:
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setenv(autoscaling.GROWS_TO, grows)
    assert cluster.capacity(resource) == most


def test_a_wrong_list_of_what_may_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autoscaling.GROWS_TO, "many")
    with pytest.raises(UserError, match=r"GROWS_TO=many: no list of resources; write CPU=96,GPU=4"):
        cluster.capacity("GPU")


def test_a_run_takes_its_share_of_what_the_cluster_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8.0})
    assert cluster.cpus_per_worker(32) == 0.12
    monkeypatch.setenv(autoscaling.GROWS_TO, "CPU=96")
    assert cluster.cpus_per_worker(96) == cluster.cpus_per_worker(1) == 0.5
