"""Sweeps as their user runs them: what they cost beside the training, and what is left of them after many
kills.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Bench
from parallelmind.evaluation.facts import write_facts

_SLOTS, _KILLS = 2, 20
_SECONDS = (
    8.0,
    40.0,
)  # a driver's life before it is killed: from before its first trial to after its first checkpoints
_RUN = {
    "data_path": "train.jsonl",
    "validation_path": "held_out.jsonl",
    "validation_branches": [1, 8],
    "validation_samples": 8,
    "batch_size": 1,
    "log_every": 1,
}


def _sweep(folder: Path, train: dict[str, Any], ranks: list[int]) -> Path:
    """The settings of a sweep, in a folder with its data. The data is large enough for any number of
    steps.
    """
    write_facts(str(folder / "train.jsonl"), 600, seed=1)
    write_facts(str(folder / "held_out.jsonl"), 4, seed=2)
    settings = {
        "name": "bench",
        "train": {**_RUN, **train},
        "space": {"lora_rank": ranks},
        "metrics": ["validation/loss_1"],
        "max_concurrent": _SLOTS,
    }
    (folder / "sweep.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder


def _start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "workloads.sweep", "sweep.yaml"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _events(folder: Path) -> list[dict[str, Any]]:
    journal = next((folder / "runs").glob("bench-*/journal.jsonl"))
    return [json.loads(line) for line in journal.read_text().splitlines()]


def _training_share() -> float:
    """Seconds of training and validating, of eight trials on two slots, over the wall clock of both slots."""
    with TemporaryDirectory() as name:
        folder = _sweep(Path(name), {"max_steps": 120, "validate_every": 60}, [2, 3, 4, 6, 8, 12, 16, 24])
        started = time.perf_counter()
        if _start(folder).wait():
            raise RuntimeError("the sweep has failed")
        wall = time.perf_counter() - started
        seconds = {
            event["trial"]: event["metrics"]["seconds"] for event in _events(folder) if "metrics" in event
        }
        print(f"trials of {min(seconds.values()):.0f} s and more,", end=" ", file=sys.stderr)
        return sum(seconds.values()) / (wall * _SLOTS)


def _finished_once_under_kills() -> float:
    """Share of trials that end exactly once and tell no step twice, while the driver is killed at random
    moments.
    """
    moments = random.Random(0)
    with TemporaryDirectory() as name:
        folder = _sweep(
            Path(name), {"max_steps": 6, "validate_every": 2, "checkpoint_every": 1}, [2, 3, 4, 6, 8, 12]
        )
        for _ in range(_KILLS):
            driver = _start(folder)
            try:
                driver.wait(moments.uniform(*_SECONDS))
            except subprocess.TimeoutExpired:
                driver.send_signal(signal.SIGKILL)
                driver.wait()
        if _start(folder).wait():
            raise RuntimeError("the sweep does not go on")
        ends = Counter(event["trial"] for event in _events(folder) if event.get("status") == "finished")
        steps = Counter((event["trial"], event["step"]) for event in _events(folder) if "metrics" in event)
        twice = {trial for (trial, _), count in steps.items() if count > 1}
        return sum(count == 1 and trial not in twice for trial, count in ends.items()) / 6


BENCHES = [
    Bench("sweep.training_share", 0.85, "higher", "share", _training_share),
    Bench("sweep.finished_once_under_20_kills", 1.0, "higher", "share", _finished_once_under_kills),
]
