"""Messages and remedies of the doctor: Ray, storage, nodes and MLflow."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import ray
import s3
from doctoring import isolated_cwd, run_check

from parallelmind.tracking import MlflowClient, absolute_uri, check_store
from serving.runtime.ports import free_port
from workloads.common import cluster
from workloads.doctor import storage_checks, storage_probe


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return isolated_cwd(tmp_path, monkeypatch)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_unreachable_cluster_fails(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    result = run_check("ray", ray_address=address)
    assert result.status == "FAIL"
    assert f"ray_address={address}: nothing answers there" in result.message
    assert "ray start --head" in result.remedy


def test_an_address_without_a_port_fails() -> None:
    result = run_check("ray", ray_address="nonsense")
    assert result.status == "FAIL"
    assert "ray_address=nonsense: " in result.message


@pytest.mark.parametrize(("address", "remedy"), [(None, "less busy"), ("10.0.0.1:6379", "RAY_AUTH_TOKEN")])
def test_a_cluster_that_refuses_this_process_fails(
    address: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*_: object, **__: object) -> None:
        raise RuntimeError("Version mismatch:\n    Ray: 2.1")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    result = run_check("ray", ray_address=address)
    assert result.status == "FAIL"
    assert "cannot be used (Version mismatch: Ray: 2.1)" in result.message
    assert remedy in result.remedy


def test_a_cluster_without_gpus_fails_and_one_without_a_token_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    node = {"NodeID": "abcdef0123", "NodeManagerAddress": "10.0.0.1"}
    monkeypatch.setattr(ray, "nodes", lambda: [{**node, "Alive": True}, {**node, "Alive": False}])
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    result = run_check("ray", use_gpu=True)
    assert (result.status, result.message) == ("FAIL", "use_gpu=true: the cluster has no GPU")
    result = run_check("ray", ray_address="10.0.0.1:6379")
    assert (result.status, "RAY_AUTH_MODE=token" in result.remedy) == ("warn", True)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    result = run_check("ray", ray_address="10.0.0.1:6379")
    assert result.status == "ok"
    assert result.message.endswith("1 node, 4 CPUs, 0 GPUs, token auth on")


def test_a_usable_folder_is_left_unchanged(cwd: Path) -> None:
    assert run_check("storage", output_dir="deep/runs").status == "ok"
    assert list(cwd.iterdir()) == []
    (cwd / "runs").mkdir()
    assert run_check("storage").status == "ok"
    assert list((cwd / "runs").iterdir()) == []


@pytest.mark.parametrize("folder", ["/proc/nowhere/runs", "file/runs", "file"])
def test_an_unusable_folder_fails(cwd: Path, folder: str) -> None:
    (cwd / "file").write_text("")
    result = run_check("storage", output_dir=folder)
    assert result.status == "FAIL"
    assert f"{folder}: cannot be used (" in result.message
    assert result.remedy == "choose a folder that this user may write to"


def test_nodes_that_do_not_share_the_folder_are_named(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node a shares the folder, node b has none at that path, and node c has another one of the same name."""
    unshared = cwd / "other"

    def on_every_node(probe: Any, shared: Path) -> dict[str, tuple[str, str | None]]:
        (unshared / shared.name).mkdir(parents=True)
        problems = {"a": probe("a", shared), "b": probe("b", unshared / shared.name)}
        storage_probe.write_driver_file(unshared / shared.name)
        problems["c"] = probe("c", unshared / shared.name)
        return {node: (f"node {node}", problem) for node, problem in problems.items()}

    monkeypatch.setattr(storage_checks, "_run_on_every_node", on_every_node)
    result = run_check("nodes")
    assert result.status == "FAIL"
    assert "node a" not in result.message
    assert "node b cannot use what the driver wrote there (No such file or directory)" in result.message
    assert "node c wrote a file that the driver does not see" in result.message
    assert "mount one storage at that path on all nodes" in result.remedy


def test_an_mlflow_database_is_left_unchanged(cwd: Path) -> None:
    assert run_check("mlflow", mlflow_uri="sqlite:///deep/mlflow.db").status == "ok"
    assert list(cwd.iterdir()) == []
    uri = absolute_uri("sqlite:///mlflow.db")
    assert check_store(uri, "parallelmind")  # makes the database
    assert run_check("mlflow").status == "ok"
    client = MlflowClient(uri)
    experiments = client.search_experiments()
    assert [experiment.name for experiment in experiments] == ["Default"]
    assert client.search_runs([experiment.experiment_id for experiment in experiments], run_view_type=3) == []


def test_an_unreachable_mlflow_server_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    result = run_check("mlflow", mlflow_uri=uri)
    assert result.status == "FAIL"
    assert re.fullmatch(rf"mlflow_uri={uri}: cannot be used \(.*Connection refused\)", result.message)
    assert "a running server" in result.remedy


@pytest.mark.parametrize(
    "uri", ["nonsense://x", "sqlite:////proc/nowhere/x.db", "postgresql+nodriver://x@127.0.0.1/x"]
)
def test_an_unusable_mlflow_store_fails(uri: str) -> None:
    result = run_check("mlflow", mlflow_uri=uri)
    assert (result.status, result.message.startswith(f"mlflow_uri={uri}: "), bool(result.remedy)) == (
        "FAIL",
        True,
        True,
    )


@pytest.mark.parametrize("bucket", [s3.BUCKET, "no-such-bucket"])
def test_storage_at_a_uri_is_written_and_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3.server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        result = run_check("storage", output_dir=(uri := f"s3://{bucket}/{uuid4().hex}"))
        assert result.status == ("ok" if bucket == s3.BUCKET else "FAIL")
        if bucket == s3.BUCKET:
            assert result.message == f"wrote, read and deleted a file at {uri}"
        else:
            assert result.remedy == "check address and credentials"
