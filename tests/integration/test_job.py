"""`ray job submit` against a cluster whose Python has the dependencies but not this project."""

import json
from pathlib import Path

import clusters
import pytest
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


def submit(python, address, *overrides):
    options = ["--address", address, "--working-dir", ".", "--runtime-env", "runtime_env.yaml"]
    line = ["job", "submit", *options, "--", "python", "-m", "workloads.train", *overrides]
    return clusters.command(python, "ray.scripts.scripts", *line)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_job_runs_on_a_cluster_without_the_project(cluster, bare_python, tiny_run, workers):
    overrides = [
        f"base_model={tiny_run / 'base'}",
        f"data_path={tiny_run / 'train.jsonl'}",
        f"output_dir={tiny_run / 'runs'}",
        f"mlflow_uri=sqlite:///{tiny_run / 'mlflow.db'}",
        f"num_workers={workers}",
        "max_steps=3",
        "log_every=1",
    ]
    done = submit(bare_python, cluster, *overrides)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "step 3/3" in done.stdout
    assert len(list((tiny_run / "runs").glob("*/adapter/parallelmind.json"))) == 1


@pytest.mark.slow
def test_a_wrong_field_fails_the_job_with_one_line(cluster, bare_python):
    done = submit(bare_python, cluster, "data_path=x", "lora_rnk=3")
    assert done.returncode != 0
    assert "lora_rnk: unknown field (did you mean lora_rank?)" in done.stdout + done.stderr
