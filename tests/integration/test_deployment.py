"""Clusters as the deployment files define them: they scale, require the token, and listen on loopback."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import autoscaling
import clusters
import psutil
import pytest
from servers import LOOPBACK, ROOT, Server, answer, listening

PYTHON = Path(sys.executable)
TASKS = """
import os, ray
from workloads.common import cluster, resources
cluster.connect(None, forward_output=False)
concurrent = [resources.max_concurrent_runs(8, *run, None) for run in ((2, True), (1, False))]
print("trials at a time:", *concurrent)
node_type = lambda: os.environ["RAY_NODE_TYPE_NAME"]
print("task on", ray.get(ray.remote(num_cpus=1)(node_type).remote()))
print("trainer on", ray.get(ray.remote(num_gpus=1)(node_type).remote()))
"""
LOCAL = """
import sys, urllib.error, urllib.request
from workloads.common.cluster import connect
connect(None)
import ray
print(ray.get(ray.remote(lambda: "works").remote()))
url = f"http://{ray._private.worker.get_dashboard_url()}/api/jobs/"
request = urllib.request.Request(url, b"{}", method="POST")
try:
    urllib.request.urlopen(request)
except urllib.error.HTTPError as error:
    print("a job without the token:", error.code)
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.mark.full
@pytest.mark.slow
def test_tasks_add_workers_of_their_type_which_end_when_idle(tmp_path: Path) -> None:
    script = tmp_path / "tasks.py"
    script.write_text(TASKS, encoding="utf-8")
    with autoscaling.autoscaling_cluster(PYTHON, tmp_path, idle_s=3) as dashboard:
        job = {"entrypoint": f"python {script}", "submission_id": "tasks"}
        clusters.wait_until(lambda: dashboard.request("POST", "/api/jobs/", job).status == 200)
        clusters.wait_until(lambda: autoscaling.count_workers(dashboard) > 0)
        clusters.wait_until(lambda: dashboard.get("/api/jobs/tasks")[1]["status"] in ("SUCCEEDED", "FAILED"))
        logs = dashboard.get("/api/jobs/tasks/logs")[1]["logs"]
        assert "trials at a time: 2 12" in logs  # on nodes that do not exist yet
        assert "task on data_worker" in logs
        assert "trainer on gpu_worker" in logs
        clusters.wait_until(lambda: autoscaling.count_workers(dashboard) == 0)
        assert {ip for ip, _ in listening(psutil.Process(dashboard.process.pid))} <= LOOPBACK


def jobs_status(dashboard: Server, method: str, **headers: str) -> int:
    """The HTTP status of a request to the jobs API."""
    with dashboard.request(method, "/api/jobs/", {"entrypoint": "true"}, **headers) as response:
        return response.status


@pytest.mark.full
@pytest.mark.slow
def test_jobs_are_refused_without_the_token() -> None:
    token = secrets.token_hex(32)
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    with clusters.cluster(PYTHON, SHARED="/shared", **settings) as dashboard:
        for headers, status in (({}, 401), ({"authorization": "Bearer guess"}, 403)):
            assert (
                jobs_status(dashboard, "POST", **headers)
                == jobs_status(dashboard, "GET", **headers)
                == status
            )
        valid = {"authorization": f"Bearer {token}"}
        clusters.wait_until(
            lambda: jobs_status(dashboard, "POST", **valid) == 200
        )  # the node's agent must be up, too
        assert jobs_status(dashboard, "GET", **valid) == 200
        command = ["job", "submit", "--address", dashboard.url, "--no-wait", "--submission-id", "a"]
        command += ["--", "sh", "-c", "echo runs are in $SHARED/runs"]
        assert clusters.command(PYTHON, "ray.scripts.scripts", *command).returncode != 0
        assert clusters.command(PYTHON, "ray.scripts.scripts", *command, **settings).returncode == 0
        logs = "/api/jobs/a/logs"
        clusters.wait_until(
            lambda: "runs are in /shared/runs" in answer(dashboard.request("GET", logs, **valid))[1]["logs"]
        )


@pytest.mark.slow
def test_a_local_cluster_listens_on_loopback_and_requires_the_token(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = {
        **inherited,
        "PYTHONPATH": paths,
        "HOME": str(tmp_path),
    }  # Ray writes a token there if there is none
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([PYTHON, "-c", LOCAL], cwd=tmp_path, env=env, text=True, **pipes) as driver:
        assert driver.stdout is not None
        lines = [driver.stdout.readline().strip() for _ in range(2)]
        addresses = {ip for ip, _ in listening(psutil.Process(driver.pid))}
        driver.communicate("")
    assert lines == ["works", "a job without the token: 401"]
    assert addresses
    assert addresses <= LOOPBACK
    assert (tmp_path / ".ray" / "auth_token").read_text()
