"""`python -m workloads.generate num_workers=1` on a local Ray cluster, with a tiny model."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tiny import save_tiny

from workloads.generate.command import main as generate

ROOT = Path(__file__).resolve().parents[2]
INVALID_LINE = 300
FIELDS = ["base_model=tiny", "data_path=data.jsonl", "max_new_tokens=16", "ignore_eos=true"]
DISTRIBUTED = ["output_path=parts", "num_workers=1"]

pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    """A working directory with a model and enough lines for four parts."""
    save_tiny(tmp_path / "tiny")
    draw = random.Random(0)
    lines = [
        json.dumps({"branches": [" ".join(["who lives", *["in"] * draw.randint(0, 99)])] * 2})
        for _ in range(300)
    ]
    lines.insert(INVALID_LINE - 1, "{bad")
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Environment of the command; removes the temporary folder that a killed Ray driver leaves behind."""
    ray_tmpdir = tempfile.mkdtemp(prefix="pm-")  # short, because paths of sockets are limited in length
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    yield {
        **os.environ,
        "PYTHONPATH": paths,
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": ray_tmpdir,
    }
    shutil.rmtree(ray_tmpdir, ignore_errors=True)


def kill_with_cluster(driver: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the driver and to the processes of its cluster, which could outlive it for minutes."""
    processes = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    driver.wait()
    psutil.wait_procs(processes, timeout=30)


def test_killed_driver_resumes_with_the_missing_parts(
    working_dir: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(working_dir)
    command = [sys.executable, "-m", "workloads.generate", *FIELDS, *DISTRIBUTED]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not any((working_dir / "parts").glob("part-*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    kill_with_cluster(first)
    parts_before = {part: part.stat() for part in (working_dir / "parts").glob("*.jsonl")}

    second = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert second.returncode == 0, second.stderr
    parts = sorted((working_dir / "parts").iterdir())
    assert f"resuming with {len(parts) - len(parts_before)} of {len(parts)} parts" in second.stderr
    assert f"data.jsonl:{INVALID_LINE}: is not JSON" in second.stderr
    assert 1 <= len(parts_before) < len(parts) == 4
    for part, before in parts_before.items():
        assert (part.stat().st_ino, part.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    generate([*FIELDS, "output_path=single.jsonl"])
    assert b"".join(part.read_bytes() for part in parts) == (working_dir / "single.jsonl").read_bytes()
    generate([*FIELDS, *DISTRIBUTED])  # no part is missing, so Ray is not started
