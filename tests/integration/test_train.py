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
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from tiny import save_tiny

from parallelmind.data.files import file_parts, find_files
from parallelmind.model.adapter import load_model_with_lora
from parallelmind.storage import sha256

ROOT = Path(__file__).resolve().parents[2]
STANDALONE, RECORDS, BRANCHES = 60, 12, 84
BAD = b'{"text": 3}\n{"text": "half\n\xff\xfe\n'


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, data with three bad lines from line 21 on, and settings."""
    folder = tmp_path_factory.mktemp("train")
    save_tiny(folder / "tiny")
    lines = [
        {"text": f"Question: {i % 5} Answer: the {i % 5}\u2028lives", "answer_offset": 4}
        for i in range(STANDALONE)
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


def train(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workloads.train", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=400, check=False
    )


@cache
def trained(cwd: Path, workers: int) -> subprocess.CompletedProcess[str]:
    """A run of run.yaml, named w1 or w2 after its number of workers. Runs once per module."""
    return train(cwd, "run.yaml", f"name=w{workers}", f"num_workers={workers}")


def interrupted(cwd: Path, line_start: str, *arguments: str) -> str:
    """Start a run, send SIGINT as soon as a printed line begins with `line_start`, and return the rest."""
    command = [sys.executable, "-m", "workloads.train", *arguments]
    running = subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith(line_start):
            running.send_signal(signal.SIGINT)
            break
    output, _ = running.communicate(timeout=400)
    assert running.returncode == 130
    return output


def run_dir(cwd: Path, name: str) -> Path:
    (folder,) = (cwd / "runs").glob(f"{name}-*")
    return folder


def mlflow_run(cwd: Path, folder: Path) -> Run:
    """The one MLflow run of a training run."""
    client = MlflowClient(f"sqlite:///{cwd}/mlflow.db")
    experiment = client.get_experiment_by_name("parallelmind")
    assert experiment is not None
    (matching_run,) = [
        run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == folder.name
    ]
    return matching_run


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"^step \d+/\d+  loss (\S+)", output, re.MULTILINE)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_run_from_start_to_adapter(cwd: Path, workers: int) -> None:
    completed = trained(cwd, workers)
    assert completed.returncode == 0, completed.stderr
    assert "MapBatches" not in completed.stderr
    assert f"{STANDALONE + RECORDS} records, {BRANCHES} branches, 3 bad lines" in completed.stdout
    for line, reason in ((21, "is a JSON number"), (22, "is not JSON"), (23, "is not UTF-8")):
        assert re.search(rf"data\.jsonl:{line}: .*{reason}", completed.stderr)
    logged_losses = losses(completed.stdout)
    assert logged_losses[-1] < logged_losses[0]
    folder = run_dir(cwd, f"w{workers}")
    quarantine = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["line"], Path(row["file"]).name) for row in quarantine] == [
        (n, "data.jsonl") for n in (21, 22, 23)
    ]
    model, _ = load_model_with_lora(base_model=str(cwd / "tiny"), lora_path=folder / "adapter")
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    run = mlflow_run(cwd, folder)
    assert run.info.status == "FINISHED"
    assert {"data_sha256", "code_sha256", "version.torch"} <= run.data.tags.keys()
    assert (folder / "loss.png").stat().st_size > 10_000
    assert {"validation/loss_1", "validation/branch_tax_4"} <= run.data.metrics.keys()
    # Each epoch trains on every branch of the file, whatever the number of workers.
    assert run.data.metrics["branches"] == 2 * BRANCHES
    repeated = train(cwd, str(folder / "config.yaml"))
    assert repeated.returncode == 0
    assert "already finished" in repeated.stdout


TREE = {
    "main": "the passage",
    "branches": [
        {"text": " who lives", "targets": [], "branches": [" in", " of"], "reduce": " works"},
        {"prompt": " where", "completion": " is"},
    ],
    "reduce": {"prompt": " answer", "completion": " in", "branches": [" who", " what"]},
}
BAD_TREES: list[dict[str, Any]] = [
    {"main": "the", "reduce": "who"},
    {**TREE, "reduce": {"prompt": "", "completion": "a"}},
]


@pytest.fixture(scope="module")
def trees(cwd: Path) -> str:
    """A data_path of trees in both formats, with two bad lines among them."""
    lines = [json.dumps(value) + "\n" for value in [TREE, BAD_TREES[0], TREE, BAD_TREES[1], *[TREE] * 18]]
    (cwd / "trees.jsonl").write_text("".join(lines))
    pq.write_table(pa.Table.from_pylist([TREE] * 20), cwd / "trees.parquet")
    return "trees.jsonl,trees.parquet"


@pytest.mark.slow
def test_trees_are_trained_and_bad_ones_cost_no_neighbour(cwd: Path, trees: str) -> None:
    completed = train(
        *(cwd, "run.yaml", "name=trees", f"data_path={trees}", "validation_path=trees.parquet"),
        *("packing=true", "accumulation_steps=2", "gradient_checkpointing=true", "dtype=bfloat16"),
    )
    assert completed.returncode == 0, completed.stderr
    assert "data: 40 records (40 trees), 240 branches, 2 bad lines" in completed.stdout
    assert "trees.jsonl:2: record has reduce without branches" in completed.stderr
    assert "trees.jsonl:4: reduce.prompt is empty" in completed.stderr
    logged_losses = losses(completed.stdout)
    assert len(logged_losses) == 2 * 40 / 4 / 2  # epochs, records, batch_size, accumulation_steps
    assert logged_losses[-1] < logged_losses[0]
    assert (run_dir(cwd, "trees") / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_trees_need_the_patch(cwd: Path, trees: str) -> None:
    settings = ("patch_rope=false", "branches_per_sample=1", "max_branches_per_sample=1")
    completed = train(cwd, "run.yaml", "name=unpatched", f"data_path={trees}", *settings)
    assert completed.returncode == 2
    error = completed.stderr.splitlines()[-1]
    assert error.startswith(f"error: patch_rope=false: 40 records of data_path={trees} hold nested branches")


def test_strict_stops_at_the_first_bad_line(cwd: Path) -> None:
    completed = train(cwd, "run.yaml", "name=strict", "strict=true")
    assert completed.returncode == 2
    assert re.fullmatch(
        r"error: data_path=data\.jsonl: \S+data\.jsonl:21: .*strict=false.*\n", completed.stderr
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data_path=nowhere.jsonl", "data_path=nowhere.jsonl: no such file"),
        ("validation_path=nowhere.jsonl", "validation_path=nowhere.jsonl: no such file"),
        ("learning_rat=1", "did you mean learning_rate?"),
        ("base_model=./nowhere", "base_model=./nowhere: no such folder"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(cwd: Path, override: str, message: str) -> None:
    completed = train(cwd, "run.yaml", "name=wrong", override)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert completed.stderr.count("\n") == 1


@pytest.mark.full
@pytest.mark.slow
def test_an_error_of_a_worker_is_one_line_too(cwd: Path) -> None:
    completed = train(cwd, "run.yaml", "name=targets", "lora_targets=nothing", "validation_path=null")
    assert completed.returncode == 2
    assert "error: lora_targets=nothing" in completed.stderr
    assert "Traceback" not in completed.stderr


@pytest.mark.full
@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes_with_another_number_of_workers(
    cwd: Path,
) -> None:
    arguments = ("run.yaml", "name=cut", "validation_path=null", "global_batch_size=8")
    match = re.search(
        r"stopped at step (\d+); checkpoint: (\S+)",
        interrupted(cwd, "step 3/", *arguments, "num_workers=2"),
    )
    assert match is not None
    assert Path(match[2]).is_dir()
    completed = train(cwd, *arguments, "num_workers=1")
    assert completed.returncode == 0, completed.stderr
    assert f"resuming from {match[2]}" in completed.stdout
    assert f"step {int(match[1]) + 1}/" in completed.stdout
    folder = run_dir(cwd, "cut")
    assert mlflow_run(cwd, folder).data.metrics["branches"] == 2 * BRANCHES
    assert (folder / "adapter" / "parallelmind.json").is_file()


def metric_points(cwd: Path, folder: Path) -> list[tuple[str, int, float]]:
    """Every metric point of a training run, except timings and memory."""
    client, run = MlflowClient(f"sqlite:///{cwd}/mlflow.db"), mlflow_run(cwd, folder)
    names = sorted(run.data.metrics.keys() - {"tokens_per_second", "peak_memory_gib", "seconds"})
    return [
        (name, point.step, point.value)
        for name in names
        for point in client.get_metric_history(run.info.run_id, name)
    ]


@pytest.mark.full
@pytest.mark.slow
def test_many_files_read_by_ray_data_train_like_one_file_also_when_interrupted(cwd: Path) -> None:
    """Batches depend on the order of the records, not on file parts or on the processes that read them."""
    lines = (cwd / "data.jsonl").read_bytes().splitlines(keepends=True)
    parts = cwd / "parts"
    parts.mkdir()
    for first in range(0, len(lines), 9):
        (parts / f"{first:03}.jsonl").write_bytes(b"".join(lines[first : first + 9]))
    assert len(file_parts(find_files(str(parts)))) > 4  # fewer would be read without Ray Data
    arguments = ("run.yaml", "name=many", "data_path=parts")
    assert "stopped at step" in interrupted(cwd, "step 3/", *arguments)
    completed = train(cwd, *arguments)
    assert completed.returncode == 0, completed.stderr
    assert "resuming from" in completed.stdout
    assert re.search(r"parts/018\.jsonl:3: .*is a JSON number", completed.stderr)
    assert trained(cwd, 1).returncode == 0
    one_file, many_files = run_dir(cwd, "w1"), run_dir(cwd, "many")
    assert metric_points(cwd, one_file) == metric_points(cwd, many_files)
    weights = [sha256(folder / "adapter" / "adapter_model.safetensors") for folder in (one_file, many_files)]
    assert weights[0] == weights[1]
