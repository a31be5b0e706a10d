"""`ray job submit` against a cluster whose Python has the dependencies but not this project."""

import json
import zipfile
from pathlib import Path

import clusters
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from servers import ROOT
from tiny import save_tiny


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    return clusters.bare_python(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def cluster(bare_python):
    """The address of a cluster's dashboard."""
    with clusters.cluster(bare_python) as dashboard:
        yield dashboard.url


@pytest.fixture
def tiny_run(tmp_path):
    save_tiny(tmp_path / "base")
    with open(tmp_path / "train.jsonl", "w", encoding="utf-8") as file:
        for n in range(48):
            branches = [{"prompt": f" what is {n} + {k}?", "completion": f" {n + k}"} for k in range(3)]
            file.write(json.dumps({"main": f"sums of {n}.", "branches": branches}) + "\n")
    return tmp_path


def submit(python, address, workload, *arguments, options=()):
    options = ["--address", address, "--working-dir", ".", "--runtime-env", "runtime_env.yaml", *options]
    command = ["job", "submit", *options, "--", "python", "-m", f"workloads.{workload}", *arguments]
    return clusters.command(python, "ray.scripts.scripts", *command)


def settings(tiny_run, **overrides):
    """Settings of a training run. Paths are absolute: a job's working directory is a copy of the project."""
    paths = {
        "base_model": tiny_run / "base",
        "data_path": tiny_run / "train.jsonl",
        "output_dir": tiny_run / "runs",
        "mlflow_uri": f"sqlite:///{tiny_run / 'mlflow.db'}",
    }
    return {**paths, "max_steps": 3, "log_every": 1, **overrides}


def dotlist(**values):
    return [f"{name}={value}" for name, value in values.items()]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.full), 2])
def test_the_same_job_runs_on_a_cluster_without_the_project(cluster, bare_python, tiny_run, workers):
    completed = submit(bare_python, cluster, "train", *dotlist(**settings(tiny_run, num_workers=workers)))
    assert completed.returncode == 0, completed.stdout[-4000:] + completed.stderr[-4000:]
    assert "step 3/3" in completed.stdout
    assert len(list((tiny_run / "runs").glob("*/adapter/parallelmind.json"))) == 1


@pytest.mark.full
@pytest.mark.slow
def test_a_wrong_field_fails_the_job_with_one_line(cluster, bare_python):
    completed = submit(bare_python, cluster, "train", "data_path=x", "lora_rnk=3")
    assert completed.returncode != 0
    assert "lora_rnk: unknown field (did you mean lora_rank?)" in completed.stdout + completed.stderr


def output_of(completed):
    assert completed.returncode == 0, completed.stdout[-4000:] + completed.stderr[-4000:]
    return completed.stdout


@pytest.mark.full
@pytest.mark.slow
def test_every_workload_runs_as_a_job(cluster, bare_python, tiny_run):
    """Converts records, runs a sweep, and evaluates and generates with its best adapter."""
    articles = [
        {"question": f"what is {n} + {k}?", "answer": f"{n + k}"} for n in range(24) for k in range(3)
    ]
    (tiny_run / "source.jsonl").write_text("".join(json.dumps(article) + "\n" for article in articles))
    converted = tiny_run / "converted.jsonl"
    convert = dotlist(
        data_path=tiny_run / "source.jsonl", output_path=converted, base_model=tiny_run / "base"
    )
    assert "72 records in" in output_of(submit(bare_python, cluster, "convert", *convert))
    run = settings(tiny_run, data_path=converted, base_model=str(tiny_run / "base"))
    sweep = {
        "name": "jobs",
        "train": {name: value if isinstance(value, int) else str(value) for name, value in run.items()},
    }
    sweep |= {"space": {"lora_rank": [2, 4]}, "metrics": ["loss"]}
    (tiny_run / "sweep.yaml").write_text(json.dumps(sweep))  # JSON is YAML
    output = output_of(submit(bare_python, cluster, "sweep", tiny_run / "sweep.yaml"))
    assert "trials   2 finished" in output
    adapter = next(line.split()[1] for line in output.splitlines() if line.startswith("adapter "))
    answers = dotlist(
        data_path=tiny_run / "train.jsonl",
        lora_path=adapter,
        max_records=2,
        output_path=tiny_run / "scores.json",
    )
    assert "over 6 questions" in output_of(submit(bare_python, cluster, "evaluate", "answers", *answers))
    assert json.loads((tiny_run / "scores.json").read_text())["questions"] == 6
    generate = dotlist(
        lora_path=adapter, data_path=tiny_run / "train.jsonl", output_path=tiny_run / "out", num_workers=2
    )
    output_of(submit(bare_python, cluster, "generate", *generate, "max_new_tokens=2"))
    lines = [
        line for part in (tiny_run / "out").glob("part-*.jsonl") for line in part.read_text().splitlines()
    ]
    assert len(lines) == 48


@pytest.mark.full
@pytest.mark.slow
def test_a_stopped_job_has_saved_a_checkpoint(cluster, bare_python, tiny_run):
    run = settings(tiny_run, max_steps=100000, epochs=100000, checkpoint_every=100000)
    submitted = submit(
        bare_python, cluster, "train", *dotlist(**run), options=("--submission-id", "stopped", "--no-wait")
    )
    assert submitted.returncode == 0, submitted.stderr
    logs = ["job", "logs", "--address", cluster, "stopped"]
    clusters.wait_until(
        lambda: "step 3/" in clusters.command(bare_python, "ray.scripts.scripts", *logs).stdout
    )
    stopped = clusters.command(
        bare_python, "ray.scripts.scripts", "job", "stop", "--address", cluster, "stopped"
    )
    assert stopped.returncode == 0, stopped.stderr
    output = clusters.command(bare_python, "ray.scripts.scripts", *logs).stdout
    assert "stopping after this step, with a checkpoint" in output
    (state_file,) = (tiny_run / "runs").glob("*/checkpoints/step-*/state.json")
    assert f"checkpoint: {state_file.parent}" in output


def test_the_upload_of_a_job_is_small_and_complete(tmp_path):
    excluded = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())["excludes"]
    target = tmp_path / "package.zip"
    create_package(str(ROOT), target, include_gitignore=True, excludes=excluded)
    assert target.stat().st_size < 2.5e6  # stored without compression
    with zipfile.ZipFile(target) as package:
        names = set(package.namelist())
    for folder in ("platform/parallelmind", "workloads", "serving", "experiments"):
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert sources <= names
    assert not [name for name in names if name.startswith((".venv", ".git/", "tests", "runs", "docs"))]
