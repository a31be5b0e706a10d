"""`python -m workloads.generate num_workers=1` as a user runs it: real Ray, a tiny model."""

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

from workloads.generate import command as generate

ROOT = Path(__file__).resolve().parents[2]
BAD = 300  # a line that is no record
FIELDS = ["base_model=tiny", "data_path=data.jsonl", "max_new_tokens=16", "ignore_eos=true"]
PARTS = ["output_path=parts", "num_workers=1"]

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with a model and lines enough for four parts."""
    save_tiny(tmp_path / "tiny")
    draw = random.Random(0)
    lines = [
        json.dumps({"branches": [" ".join(["who lives", *["in"] * draw.randint(0, 99)])] * 2})
        for _ in range(300)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[: BAD - 1], "{bad", *lines[BAD - 1 :]]))
    return tmp_path


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    scratch = tempfile.mkdtemp(
        prefix="pm-"
    )  # short, for the sake of sockets; a killed driver cannot remove it
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    yield {
        **os.environ,
        "PYTHONPATH": paths,
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": scratch,
    }
    shutil.rmtree(scratch, ignore_errors=True)


def kill(command: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the driver, then to what is left of its cluster, some of which would only notice after
    minutes.
    """
    family = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    command.wait()
    psutil.wait_procs(family, timeout=30)


def test_parts_survive_a_driver_that_is_killed_and_none_is_done_twice(
    place: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    command = [sys.executable, "-m", "workloads.generate", *FIELDS, *PARTS]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not any((place / "parts").glob("part-*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    kill(first)
    parts = {part: part.stat() for part in (place / "parts").glob("*.jsonl")}

    second = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert second.returncode == 0, second.stderr
    found = sorted((place / "parts").iterdir())
    assert f"going on with {len(found) - len(parts)} of {len(found)} parts" in second.stderr
    assert f"data.jsonl:{BAD}: is not JSON" in second.stderr
    assert 1 <= len(parts) < len(found) == 4
    for part, before in parts.items():
        assert (part.stat().st_ino, part.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    generate.main([*FIELDS, "output_path=whole.jsonl"])
    assert b"".join(part.read_bytes() for part in found) == (place / "whole.jsonl").read_bytes()
    generate.main([*FIELDS, *PARTS])  # without Ray, since nothing is missing
