"""A process that writes a sweep's journal is killed at any time."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from journaling import next_metrics

from parallelmind.remote import RemotePath
from workloads.sweep.journal import Journal

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def test_a_killed_writer_leaves_every_event_that_it_had_written(tmp_path: Path) -> None:
    """Ten kills, each some events after the start. No event is lost, torn, repeated or out of order."""
    file, written, drawn = RemotePath(tmp_path / "journal.jsonl"), 0, random.Random(0)
    for _ in range(10):
        written = _write_and_kill(file.local, events=drawn.randrange(1, 200), wait_s=drawn.random() / 200)
        journal = Journal.open(file)
        steps = [report.step for report in journal.reports]
        assert steps == list(range(1, len(steps) + 1))
        assert written <= len(steps) <= written + 1
    replayed = Journal(RemotePath(tmp_path / "other.jsonl"))
    replayed.add_trial(0, {})
    for report in journal.reports:
        assert report.metrics == next_metrics(replayed)
        replayed.reports.append(report)


def _write_and_kill(file: Path, events: int, wait_s: float) -> int:
    """Kill a writer some seconds after its first `events` events; returns the last event that it printed."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("platform", "."))
    command = [sys.executable, str(ROOT / "tests" / "journaling.py"), str(file)]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(events)]
        time.sleep(wait_s)
        process.kill()
        return int([*told, *process.stdout][-1])
