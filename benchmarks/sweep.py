"""Sweeps through the command line: overhead beside training, and correctness after repeated kills."""

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
# Seconds until a driver is killed: between the start of its first trial and its first checkpoints.
_KILL_AFTER_S = (8.0, 40.0)
_RUN = {
    "data_path": "train.jsonl",
    "validation_path": "held_out.jsonl",
    "validation_branches": [1, 8],
    "validation_samples": 8,
    "batch_size": 1,
    "log_every": 1,
}


def _sweep(folder: Path, train: dict[str, Any], ranks: list[int]) -> Path:
    """Write sweep.yaml and its data into a folder. The data suffices for any number of steps used here."""
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
    """Training and validation time of eight trials over the wall-clock time of both slots."""
    with TemporaryDirectory() as name:
        folder = _sweep(Path(name), {"max_steps": 120, "validate_every": 60}, [2, 3, 4, 6, 8, 12, 16, 24])
        start = time.perf_counter()
        if _start(folder).wait():
            raise RuntimeError("the sweep failed")
        wall = time.perf_counter() - start
        seconds = {
            event["trial"]: event["metrics"]["seconds"] for event in _events(folder) if "metrics" in event
        }
        print(f"trials of {min(seconds.values()):.0f} s and more,", end=" ", file=sys.stderr)
        return sum(seconds.values()) / (wall * _SLOTS)


def _finished_once_under_kills() -> float:
    """Share of trials that finish once and report no step twice although the driver is killed."""
    rng = random.Random(0)
    with TemporaryDirectory() as name:
        folder = _sweep(
            Path(name), {"max_steps": 6, "validate_every": 2, "checkpoint_every": 1}, [2, 3, 4, 6, 8, 12]
        )
        for _ in range(_KILLS):
            driver = _start(folder)
            try:
                driver.wait(rng.uniform(*_KILL_AFTER_S))
            except subprocess.TimeoutExpired:
                driver.send_signal(signal.SIGKILL)
                driver.wait()
        if _start(folder).wait():
            raise RuntimeError("the sweep did not resume")
        ends = Counter(event["trial"] for event in _events(folder) if event.get("status") == "finished")
        steps = Counter((event["trial"], event["step"]) for event in _events(folder) if "metrics" in event)
        repeated = {trial for (trial, _), count in steps.items() if count > 1}
        return sum(count == 1 and trial not in repeated for trial, count in ends.items()) / 6


BENCHES = [
    Bench("sweep.training_share", 0.85, "higher", "share", _training_share),
    Bench("sweep.finished_once_under_20_kills", 1.0, "higher", "share", _finished_once_under_kills),
]
