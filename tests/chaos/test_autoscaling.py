"""A sweep on a cluster without workers: the autoscaler adds them for the trials, and removes them later."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import autoscaling
import clusters
import pytest
from runs import prepare

pytestmark = pytest.mark.chaos
PYTHON = Path(sys.executable)


def test_the_autoscaler_adds_nodes_for_trials_and_removes_them(tmp_path: Path) -> None:
    prepare(tmp_path, records=64, settings={})
    train = {
        "base_model": tmp_path / "tiny",
        "data_path": tmp_path / "data.jsonl",
        "output_dir": tmp_path / "runs",
    }
    train_settings = {**train, "mlflow_uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "max_steps": 3}
    sweep = {
        "name": "grown",
        "train": train_settings,
        "space": {"lora_rank": [2, 4]},
        "metrics": ["loss"],
        "max_concurrent": 2,
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep, default=str))  # JSON is YAML
    with autoscaling.autoscaling_cluster(PYTHON, tmp_path, idle_s=5) as dashboard:
        clusters.wait_until(lambda: dashboard.get("/api/jobs/")[0] == 200)
        command = [
            "job",
            "submit",
            "--address",
            dashboard.url,
            "--working-dir",
            ".",
            "--runtime-env",
            "runtime_env.yaml",
        ]
        command += [
            "--no-wait",
            "--submission-id",
            "sweep",
            "--",
            "python",
            "-m",
            "workloads.sweep",
            str(tmp_path / "sweep.yaml"),
        ]
        assert clusters.command(PYTHON, "ray.scripts.scripts", *command).returncode == 0
        clusters.wait_until(lambda: autoscaling.count_workers(dashboard) > 0)
        clusters.wait_until(lambda: dashboard.get("/api/jobs/sweep")[1]["status"] in ("SUCCEEDED", "FAILED"))
        logs = dashboard.get("/api/jobs/sweep/logs")[1]["logs"]
        assert "trials   2 finished" in logs, logs
        clusters.wait_until(lambda: autoscaling.count_workers(dashboard) == 0)
