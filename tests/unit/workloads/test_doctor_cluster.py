"""What the doctor says of Ray, storage and MLflow where something is wrong, and what it says to do about
it.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import ray
import s3
from doctoring import found, place_of_our_own

from parallelmind.tracking import MlflowClient, absolute_uri, check_store
from serving.runtime.ports import free_port
from workloads.common import cluster
from workloads.doctor import cluster_checks as doctor_cluster
from workloads.doctor import storage_checks as doctor_storage


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return place_of_our_own(tmp_path, monkeypatch)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    finding = found("ray", ray_address=address)
    assert finding.status == "FAIL"
    assert f"ray_address={address}: nothing answers there" in finding.said
    assert "ray start --head" in finding.remedy


def test_a_cluster_of_no_known_shape() -> None:
    finding = found("ray", ray_address="nonsense")
    assert finding.status == "FAIL"
    assert "ray_address=nonsense: " in finding.said


@pytest.mark.parametrize(("address", "remedy"), [(None, "less busy"), ("10.0.0.1:6379", "RAY_AUTH_TOKEN")])
def test_a_cluster_that_cannot_be_used(
    address: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*_: object, **__: object) -> None:
        raise RuntimeError("Version mismatch:\n    Ray: 2.1")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    finding = found("ray", ray_address=address)
    assert finding.status == "FAIL"
    assert "cannot be used (Version mismatch: Ray: 2.1)" in finding.said
    assert remedy in finding.remedy


def test_a_cluster_without_gpus_and_one_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    node = {"NodeID": "abcdef0123", "NodeManagerAddress": "10.0.0.1"}
    monkeypatch.setattr(ray, "nodes", lambda: [{**node, "Alive": True}, {**node, "Alive": False}])
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    finding = found("ray", use_gpu=True)
    assert (finding.status, finding.said) == ("FAIL", "use_gpu=true: the cluster has no GPU")
    finding = found("ray", ray_address="10.0.0.1:6379")
    assert (finding.status, "RAY_AUTH_MODE=token" in finding.remedy) == ("warn", True)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    finding = found("ray", ray_address="10.0.0.1:6379")
    assert finding.status == "ok"
    assert finding.said.endswith("1 node, 4 CPUs, 0 GPUs, token auth on")


def test_a_folder_that_can_be_used_is_left_as_it_was(place: Path) -> None:
    assert found("storage", output_dir="deep/runs").status == "ok"
    assert list(place.iterdir()) == []
    (place / "runs").mkdir()
    assert found("storage").status == "ok"
    assert list((place / "runs").iterdir()) == []


@pytest.mark.parametrize("folder", ["/proc/nowhere/runs", "file/runs", "file"])
def test_a_folder_that_cannot_be_used(place: Path, folder: str) -> None:
    (place / "file").write_text("")
    finding = found("storage", output_dir=folder)
    assert finding.status == "FAIL"
    assert f"{folder}: cannot be used (" in finding.said
    assert finding.remedy == "choose a folder that this user may write to"


def test_a_node_that_does_not_see_the_same_files_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nodes: one that shares the folder, one that has an empty one there, and one that has another of
    the same name.
    """
    other = place / "other"

    def on_every_node(ask: Any, shared: Path) -> dict[str, tuple[str, str | None]]:
        (other / shared.name).mkdir(parents=True)
        told = {"a": ask("a", shared), "b": ask("b", other / shared.name)}
        doctor_storage.mark(other / shared.name)
        told["c"] = ask("c", other / shared.name)
        return {node: (f"node {node}", said) for node, said in told.items()}

    monkeypatch.setattr(doctor_cluster, "_on_every_node", on_every_node)
    finding = found("nodes")
    assert finding.status == "FAIL"
    assert "node a" not in finding.said
    assert "node b cannot use what the driver wrote there (No such file or directory)" in finding.said
    assert "node c wrote a file that the driver does not see" in finding.said
    assert "mount one storage at that path on all nodes" in finding.remedy


def test_a_database_is_left_as_it_was(place: Path) -> None:
    assert found("mlflow", mlflow_uri="sqlite:///deep/mlflow.db").status == "ok"
    assert list(place.iterdir()) == []
    uri = absolute_uri("sqlite:///mlflow.db")
    assert check_store(uri, "parallelmind")  # makes the database
    assert found("mlflow").status == "ok"
    client = MlflowClient(uri)
    experiments = client.search_experiments()
    assert [each.name for each in experiments] == ["Default"]
    assert client.search_runs([each.experiment_id for each in experiments], run_view_type=3) == []


def test_an_mlflow_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    finding = found("mlflow", mlflow_uri=uri)
    assert finding.status == "FAIL"
    assert re.fullmatch(rf"mlflow_uri={uri}: cannot be used \(.*Connection refused\)", finding.said)
    assert "a running server" in finding.remedy


@pytest.mark.parametrize(
    "uri", ["nonsense://x", "sqlite:////proc/nowhere/x.db", "postgresql+nodriver://x@127.0.0.1/x"]
)
def test_an_mlflow_store_that_cannot_be_used(uri: str) -> None:
    finding = found("mlflow", mlflow_uri=uri)
    assert (finding.status, finding.said.startswith(f"mlflow_uri={uri}: "), bool(finding.remedy)) == (
        "FAIL",
        True,
        True,
    )


@pytest.mark.parametrize("bucket", [s3.BUCKET, "no-such-bucket"])
def test_storage_at_a_uri(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3.server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        finding = found("storage", output_dir=(uri := f"s3://{bucket}/{uuid4().hex}"))
        assert finding.status == ("ok" if bucket == s3.BUCKET else "FAIL")
        if bucket == s3.BUCKET:
            assert finding.said == f"a file was written, read and removed at {uri}"
        else:
            assert finding.remedy == "check address and credentials"
