"""Runs and sweeps whose folder is at a URI, with real S3 and MLflow servers.

A machine is a process with a cache folder of its own, so machines share nothing but the bucket.
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
def cwd(tmp_path_factory: pytest.TempPathFactory, bucket: dict[str, str]) -> Path:
    """A working directory with a model, run.yaml and sweep.yaml; the data is in the bucket."""
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
    cwd: Path, bucket: dict[str, str], machine: str, workload: str, *arguments: str
) -> subprocess.Popen[str]:
    """Start `python -m workloads.WORKLOAD` on a machine, which is named after its cache folder."""
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    variables = {
        "PYTHONPATH": paths,
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    env = {**os.environ, **bucket, **variables, "PARALLELMIND_CACHE": str(cwd / machine)}
    command = [sys.executable, "-m", f"workloads.{workload}", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_output(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for the end of the process; returns its output."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == status, output
    return output


def list_keys(bucket: dict[str, str], prefix: str) -> list[str]:
    """The keys of all objects under a prefix."""
    response = _client(bucket).list_objects_v2(Bucket=s3.BUCKET, Prefix=prefix)
    return [item["Key"] for item in response.get("Contents", ()) if not item["Key"].endswith("/")]


@pytest.mark.chaos
def test_a_run_resumes_on_another_machine(cwd: Path, bucket: dict[str, str], tmp_path: Path) -> None:
    assert wait_for_output(start(cwd, bucket, "first", "train", "run.yaml", "name=whole"))
    process = start(cwd, bucket, "first", "train", "run.yaml", f"output_dir={RUNS}", "name=whole")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 13/"):
            break
    kill(process.pid)
    process.communicate()
    assert [key for key in list_keys(bucket, "tests/whole-") if key.endswith("step-5/state.json")]
    shutil.rmtree(cwd / "first" / "copies")
    output = wait_for_output(
        start(cwd, bucket, "second", "train", "run.yaml", f"output_dir={RUNS}", "name=whole")
    )
    assert f"resuming from {RUNS}/whole-" in output
    assert f"adapter  {RUNS}/whole-" in output
    (local,) = (cwd / "runs").glob("whole-*")
    (remote_name,) = {key.split("/")[1] for key in list_keys(bucket, "tests/whole-")}
    assert remote_name == local.name
    _client(bucket).download_file(
        s3.BUCKET, f"tests/{remote_name}/adapter/adapter_model.safetensors", str(tmp_path / "weights")
    )
    assert sha256(tmp_path / "weights") == sha256(local / "adapter" / "adapter_model.safetensors")
    checkpoints = {key.split("/")[3] for key in list_keys(bucket, f"tests/{remote_name}/checkpoints/")}
    assert checkpoints == {path.name for path in (local / "checkpoints").glob("step-*")}
    assert not [key for key in list_keys(bucket, f"tests/{remote_name}/") if "/." in key]
    output = wait_for_output(
        start(cwd, bucket, "third", "train", "run.yaml", f"output_dir={RUNS}", "name=whole")
    )
    assert output.startswith(f"already finished: {RUNS}/whole-")
    lora = f"lora_path={RUNS}/{remote_name}/adapter"
    assert wait_for_output(start(cwd, bucket, "third", "generate", lora, "prompt=the", "max_new_tokens=3"))


@pytest.mark.full
def test_a_stopped_run_saves_a_checkpoint_at_the_uri(cwd: Path, bucket: dict[str, str]) -> None:
    process = start(
        cwd, bucket, "first", "train", "run.yaml", f"output_dir={RUNS}", "name=stopped", "epochs=200"
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    output = wait_for_output(process, status=130)
    assert f"checkpoint: {RUNS}/stopped-" in output
    assert [key for key in list_keys(bucket, "tests/stopped-") if key.endswith("/state.json")]


@pytest.mark.chaos
def test_a_sweep_resumes_on_another_machine(cwd: Path, bucket: dict[str, str]) -> None:
    first = start(cwd, bucket, "first", "sweep", "sweep.yaml")
    deadline = time.monotonic() + 200
    while not any(key.endswith("/adapter/parallelmind.json") for key in list_keys(bucket, "tests/tiny-")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kill(first.pid)
    first.communicate()
    output = wait_for_output(start(cwd, bucket, "second", "sweep", "sweep.yaml"))
    assert "trials   2 finished" in output
    assert any(key.endswith("/report.html") for key in list_keys(bucket, "tests/tiny-"))


@contextmanager
def mlflow_server(cwd: Path, bucket: dict[str, str], store: str) -> Iterator[str]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
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
    command += ["--backend-store-uri", store, "--artifacts-destination", f"s3://{s3.BUCKET}/mlflow"]
    env = {**os.environ, **bucket, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(cwd / "mlflow.log", "wb") as log:
        server = subprocess.Popen(command, cwd=cwd, env=env, stdout=log, stderr=log)
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
    """The URI of an empty database for an MLflow server."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/server.db"
    elif postgres.bin_dir() is None:
        pytest.skip("no PostgreSQL here (apt-get install postgresql)")
    else:
        with postgres.server() as uri:
            yield uri


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_artifacts_and_models_go_through_an_mlflow_server(
    cwd: Path, bucket: dict[str, str], tmp_path: Path, kind: str
) -> None:
    with store(kind, tmp_path) as store_uri, mlflow_server(cwd, bucket, store_uri) as url:
        settings = [f"train.mlflow_uri={url}", f"name={kind}", "register_as=tiny", "space.lora_rank=[2]"]
        output = wait_for_output(start(cwd, bucket, "first", "sweep", "sweep.yaml", *settings))
        assert "model    models:/tiny@champion, version 1" in output
        version = find_model_version(url, "models:/tiny@champion")
        folder = download_artifact(url, version.source, tmp_path)
        assert (folder / "adapter_model.safetensors").is_file()
    assert any(key.endswith("adapter/parallelmind.json") for key in list_keys(bucket, "mlflow/"))
