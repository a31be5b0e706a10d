"""Runs whose folder is at a URI, on machines that share no disk: a real S3 server, and a real MLflow server
that uses it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import postgres
import pytest
import s3
from processes import kill
from tiny import save_tiny

from parallelmind.storage import sha256
from parallelmind.tracking import download_artifact, find_model_version
from serving.runtime.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
RUNS = f"s3://{s3.BUCKET}/tests"
SWEEP = """
name: tiny
train:
  base_model: tiny
  data_path: s3://runs/data.jsonl
  output_dir: s3://runs/tests
  max_steps: 4
  checkpoint_every: 2
  log_every: 2
space: {lora_rank: [2, 4]}
metrics: [loss]
max_concurrent: 1
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    with s3.server() as environment:
        yield environment


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, bucket: dict[str, str]) -> Path:
    """A working directory with a model and settings; the data is in the bucket."""
    folder = tmp_path_factory.mktemp("storage")
    save_tiny(folder / "tiny")
    lines = [{"text": f"Question: {i % 5} Answer: the {i % 5} lives", "answer_offset": 4} for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _client(bucket).upload_file(str(folder / "data.jsonl"), s3.BUCKET, "data.jsonl")
    settings = {
        "base_model": "tiny",
        "data_path": f"s3://{s3.BUCKET}/data.jsonl",
        "learning_rate": 0.01,
        "branches_per_sample": 3,
        "batch_size": 2,
        "epochs": 4,
        "log_every": 1,
        "checkpoint_every": 5,
    }
    (folder / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


def _client(bucket: dict[str, str]):  # type: ignore[no-untyped-def]
    return boto3.client(
        "s3", endpoint_url=bucket["AWS_ENDPOINT_URL"], aws_access_key_id="key", aws_secret_access_key="secret"
    )


def start(
    place: Path, bucket: dict[str, str], machine: str, workload: str, *arguments: str
) -> subprocess.Popen[str]:
    """A command on a machine that has nothing of the others' working copies."""
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    ours = {"PYTHONPATH": paths, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    env = {**os.environ, **bucket, **ours, "PARALLELMIND_CACHE": str(place / machine)}
    command = [sys.executable, "-m", f"workloads.{workload}", *arguments]
    return subprocess.Popen(
        command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def said(running: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = running.communicate(timeout=400)
    assert running.returncode == status, output
    return output


def keys(bucket: dict[str, str], prefix: str) -> list[str]:
    found = _client(bucket).list_objects_v2(Bucket=s3.BUCKET, Prefix=prefix)
    return [item["Key"] for item in found.get("Contents", ()) if not item["Key"].endswith("/")]


@pytest.mark.chaos
def test_a_run_is_gone_on_with_on_another_machine(
    place: Path, bucket: dict[str, str], tmp_path: Path
) -> None:
    assert said(start(place, bucket, "first", "train", "run.yaml", "name=whole"))
    running = start(place, bucket, "first", "train", "run.yaml", f"output_dir={RUNS}", "name=whole")
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step 13/"):
            break
    kill(running.pid)
    running.communicate()
    assert [key for key in keys(bucket, "tests/whole-") if key.endswith("step-5/state.json")]
    shutil.rmtree(place / "first" / "copies")
    told = said(start(place, bucket, "second", "train", "run.yaml", f"output_dir={RUNS}", "name=whole"))
    assert f"resuming from {RUNS}/whole-" in told
    assert f"adapter  {RUNS}/whole-" in told
    (local,) = (place / "runs").glob("whole-*")
    (there,) = {key.split("/")[1] for key in keys(bucket, "tests/whole-")}
    assert there == local.name
    _client(bucket).download_file(
        s3.BUCKET, f"tests/{there}/adapter/adapter_model.safetensors", str(tmp_path / "weights")
    )
    assert sha256(tmp_path / "weights") == sha256(local / "adapter" / "adapter_model.safetensors")
    left = {key.split("/")[3] for key in keys(bucket, f"tests/{there}/checkpoints/")}
    assert left == {path.name for path in (local / "checkpoints").glob("step-*")}
    assert not [key for key in keys(bucket, f"tests/{there}/") if "/." in key]
    again = said(start(place, bucket, "third", "train", "run.yaml", f"output_dir={RUNS}", "name=whole"))
    assert again.startswith(f"finished before: {RUNS}/whole-")
    lora = f"lora_path={RUNS}/{there}/adapter"
    assert said(start(place, bucket, "third", "generate", lora, "prompt=the", "max_new_tokens=3"))


def test_a_stop_saves_a_checkpoint_there(place: Path, bucket: dict[str, str]) -> None:
    running = start(
        place, bucket, "first", "train", "run.yaml", f"output_dir={RUNS}", "name=stopped", "epochs=200"
    )
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step 3/"):
            running.send_signal(signal.SIGTERM)
            break
    told = said(running, status=130)
    assert f"checkpoint: {RUNS}/stopped-" in told
    assert [key for key in keys(bucket, "tests/stopped-") if key.endswith("/state.json")]


@pytest.mark.chaos
def test_a_sweep_there_goes_on_elsewhere(place: Path, bucket: dict[str, str]) -> None:
    first = start(place, bucket, "first", "sweep", "sweep.yaml")
    deadline = time.monotonic() + 200
    while not any(key.endswith("/adapter/parallelmind.json") for key in keys(bucket, "tests/tiny-")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kill(first.pid)
    first.communicate()
    told = said(start(place, bucket, "second", "sweep", "sweep.yaml"))
    assert "trials   2 finished" in told
    assert any(key.endswith("/report.html") for key in keys(bucket, "tests/tiny-"))


@contextmanager
def mlflow_server(place: Path, bucket: dict[str, str], store: str) -> Iterator[str]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    line = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    line += ["--backend-store-uri", store, "--artifacts-destination", f"s3://{s3.BUCKET}/mlflow"]
    env = {**os.environ, **bucket, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(place / "mlflow.log", "wb") as log:
        server = subprocess.Popen(line, cwd=place, env=env, stdout=log, stderr=log)
    try:
        _wait_for(f"{url}/health", server)
        yield url
    finally:
        kill(server.pid)
        server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert server.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise TimeoutError(url)


@contextmanager
def store(kind: str, folder: Path) -> Iterator[str]:
    """Where an MLflow server keeps its records."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/server.db"
    elif postgres.bin_dir() is None:
        pytest.skip("no PostgreSQL here (apt-get install postgresql)")
    else:
        with postgres.server() as uri:
            yield uri


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_artifacts_and_models_go_through_an_mlflow_server(
    place: Path, bucket: dict[str, str], tmp_path: Path, kind: str
) -> None:
    with store(kind, tmp_path) as records, mlflow_server(place, bucket, records) as url:
        settings = [f"train.mlflow_uri={url}", f"name={kind}", "register_as=tiny"]
        told = said(start(place, bucket, "first", "sweep", "sweep.yaml", *settings))
        assert "model    models:/tiny@champion, version 1" in told
        found = find_model_version(url, "models:/tiny@champion")
        folder = download_artifact(url, found.source, tmp_path)
        assert (folder / "adapter_model.safetensors").is_file()
    assert any(key.endswith("adapter/parallelmind.json") for key in keys(bucket, "mlflow/"))
