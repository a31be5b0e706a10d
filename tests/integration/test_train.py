"""`python -m workloads.train` as a user runs it: real Ray, a real MLflow database, a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from tiny import save_tiny

from parallelmind.data.files import file_parts, find_files
from parallelmind.model.adapter import load_model_with_lora
from parallelmind.storage import sha256

ROOT = Path(__file__).resolve().parents[2]
LONE, RECORDS, BRANCHES = 60, 12, 84
BAD = b'{"text": 3}\n{"text": "half\n\xff\xfe\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, data with three bad lines from line 21 on, and settings."""
    folder = tmp_path_factory.mktemp("train")
    save_tiny(folder / "tiny")
    lines = [
        {"text": f"Question: {i % 5} Answer: the {i % 5}\u2028lives", "answer_offset": 4} for i in range(LONE)
    ]
    lines += [
        {"main": "the passage", "branches": [{"prompt": "who ", "completion": "lives"}, "works"]}
        for _ in range(RECORDS)
    ]
    encoded = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines]
    (folder / "data.jsonl").write_bytes(b"".join([*encoded[:20], BAD, *encoded[20:]]))
    (folder / "held_out.jsonl").write_bytes(b"".join(encoded[::5]))
    settings = {
        "base_model": "tiny",
        "data_path": "data.jsonl",
        "validation_path": "held_out.jsonl",
        "validation_branches": "[1, 4]",
        "learning_rate": 0.01,
        "batch_size": 4,
        "branches_per_sample": 3,
        "epochs": 2,
        "log_every": 1,
        "checkpoint_every": 5,
    }
    (folder / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return folder


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    return {
        **os.environ,
        "PYTHONPATH": paths,
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def train(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workloads.train", *arguments]
    return subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, timeout=400, check=False
    )


@cache
def trained(place: Path, workers: int) -> subprocess.CompletedProcess[str]:
    """The run of the settings as they are, named w and the number of workers."""
    return train(place, "run.yaml", f"name=w{workers}", f"num_workers={workers}")


def interrupted(place: Path, at: str, *arguments: str) -> str:
    """What a run says that gets Ctrl-C as soon as a line begins with `at`."""
    command = [sys.executable, "-m", "workloads.train", *arguments]
    running = subprocess.Popen(
        command, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith(at):
            running.send_signal(signal.SIGINT)
            break
    output, _ = running.communicate(timeout=400)
    assert running.returncode == 130
    return output


def run_of(place: Path, name: str) -> Path:
    (folder,) = (place / "runs").glob(f"{name}-*")
    return folder


def mlflow_run(place: Path, folder: Path) -> Run:
    """The one MLflow run of a training run."""
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiment = client.get_experiment_by_name("parallelmind")
    assert experiment is not None
    (found,) = [
        run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == folder.name
    ]
    return found


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"^step \d+/\d+  loss (\S+)", output, re.MULTILINE)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_run_from_start_to_adapter(place: Path, workers: int) -> None:
    done = trained(place, workers)
    assert done.returncode == 0, done.stderr
    assert "MapBatches" not in done.stderr
    assert f"{LONE + RECORDS} records, {BRANCHES} branches, 3 bad lines" in done.stdout
    for line, reason in ((21, "is a JSON number"), (22, "is not JSON"), (23, "is not UTF-8")):
        assert re.search(rf"data\.jsonl:{line}: .*{reason}", done.stderr)
    found = losses(done.stdout)
    assert found[-1] < found[0]
    folder = run_of(place, f"w{workers}")
    quarantine = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["line"], Path(row["file"]).name) for row in quarantine] == [
        (n, "data.jsonl") for n in (21, 22, 23)
    ]
    model, _ = load_model_with_lora(base_model=str(place / "tiny"), lora_path=folder / "adapter")
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    run = mlflow_run(place, folder)
    assert run.info.status == "FINISHED"
    assert {"data_sha256", "code_sha256", "version.torch"} <= run.data.tags.keys()
    assert (folder / "loss.png").stat().st_size > 10_000
    assert {"validation/loss_1", "validation/branch_tax_4"} <= run.data.metrics.keys()
    # Every branch of the file was trained on in each epoch, however many workers shared them.
    assert run.data.metrics["branches"] == 2 * BRANCHES
    again = train(place, str(folder / "config.yaml"))
    assert again.returncode == 0
    assert "already finished" in again.stdout


def test_strict_stops_at_the_first_bad_line(place: Path) -> None:
    done = train(place, "run.yaml", "name=strict", "strict=true")
    assert done.returncode == 2
    assert re.fullmatch(r"error: data_path=data\.jsonl: \S+data\.jsonl:21: .*strict=false.*\n", done.stderr)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data_path=nowhere.jsonl", "data_path=nowhere.jsonl: no such file"),
        ("validation_path=nowhere.jsonl", "validation_path=nowhere.jsonl: no such file"),
        ("learning_rat=1", "did you mean learning_rate?"),
        ("base_model=./nowhere", "base_model=./nowhere: no such folder"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(place: Path, override: str, message: str) -> None:
    done = train(place, "run.yaml", "name=wrong", override)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_error_that_only_a_worker_sees_is_one_line_too(place: Path) -> None:
    done = train(place, "run.yaml", "name=targets", "lora_targets=nothing", "validation_path=null")
    assert done.returncode == 2
    assert "error: lora_targets=nothing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on_with_the_rest_of_the_data_on_other_workers(
    place: Path,
) -> None:
    arguments = ("run.yaml", "name=cut", "validation_path=null")
    match = re.search(
        r"stopped at step (\d+); checkpoint: (\S+)",
        interrupted(place, "step 3/", *arguments, "num_workers=2"),
    )
    assert match is not None
    assert Path(match[2]).is_dir()
    done = train(place, *arguments, "num_workers=1")
    assert done.returncode == 0, done.stderr
    assert f"resuming from {match[2]}" in done.stdout
    assert f"step {int(match[1]) + 1}/" in done.stdout
    folder = run_of(place, "cut")
    assert mlflow_run(place, folder).data.metrics["branches"] == 2 * BRANCHES
    assert (folder / "adapter" / "parallelmind.json").is_file()


def points(place: Path, folder: Path) -> list[tuple[str, int, float]]:
    """Everything that a training run logged, but for what the clock and the machine say."""
    client, run = MlflowClient(f"sqlite:///{place}/mlflow.db"), mlflow_run(place, folder)
    names = sorted(run.data.metrics.keys() - {"tokens_per_second", "peak_memory_gib", "seconds"})
    return [
        (name, at.step, at.value) for name in names for at in client.get_metric_history(run.info.run_id, name)
    ]


@pytest.mark.slow
def test_many_files_go_through_ray_data_and_train_as_one_file_does_also_when_interrupted(place: Path) -> None:
    """The batches depend on the records in their order, not on the parts that they are read in, nor on who
    reads them.
    """
    lines = (place / "data.jsonl").read_bytes().splitlines(keepends=True)
    parts = place / "parts"
    parts.mkdir()
    for first in range(0, len(lines), 9):
        (parts / f"{first:03}.jsonl").write_bytes(b"".join(lines[first : first + 9]))
    assert len(file_parts(find_files(str(parts)))) > 4  # fewer would be read without Ray Data
    many = ("run.yaml", "name=many", "data_path=parts")
    assert "stopped at step" in interrupted(place, "step 3/", *many)
    done = train(place, *many)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert re.search(r"parts/018\.jsonl:3: .*is a JSON number", done.stderr)
    assert trained(place, 1).returncode == 0
    one, rest = run_of(place, "w1"), run_of(place, "many")
    assert points(place, one) == points(place, rest)
    weights = [sha256(folder / "adapter" / "adapter_model.safetensors") for folder in (one, rest)]
    assert weights[0] == weights[1]
