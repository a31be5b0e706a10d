"""The memory of a sweep: one JSON line for everything that happened, on the disk before anything rests on it.

Ray Tune's own state is a pickle that is written now and then; after a crash it would repeat trials or forget
them.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallelmind.remote import RemotePath
from workloads.sweep.trial import Status, Trial


@dataclass(slots=True)
class Report:
    """What a trial told at a step, in the order of all trials' reports."""

    number: int
    step: int
    metrics: dict[str, float]


@dataclass(slots=True)
class Journal:
    """Opened by `read`. Its methods may be called from any thread."""

    file: RemotePath
    trials: dict[int, Trial] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, file: RemotePath) -> Journal:
        """What is known. A last line that was cut short by a crash is removed: what it told has not
        happened.
        """
        journal, path = cls(file), file.local
        if file.uri is not None:
            path.write_bytes(file.read_bytes() or b"")
        if path.is_file():
            whole, _, cut = path.read_bytes().rpartition(b"\n")
            if cut:
                os.truncate(path, len(whole) + 1 if whole else 0)
            for line in whole.splitlines():
                journal._apply(json.loads(line))
        return journal

    def begin(self, number: int, settings: dict[str, Any]) -> None:
        self._write({"trial": number, "settings": settings})

    def placed(self, number: int, folder: str, run_id: str) -> None:
        """Where a trial is on the disk and in MLflow."""
        self._write({"trial": number, "folder": folder, "run_id": run_id})

    def report(self, number: int, step: int, metrics: Mapping[str, float]) -> bool:
        """False for a step that was told before, which a trial repeats after a crash: it is left out."""
        fresh = step > self.trials[number].step
        if fresh:
            self._write({"trial": number, "step": step, "metrics": dict(metrics)})
        return fresh

    def end(self, number: int, status: Status, error: str | None = None) -> None:
        if not self.trials[number].ended:
            self._write({"trial": number, "status": status, "error": error})

    def note(self, **facts: Any) -> None:
        """Facts about the sweep as a whole."""
        self._write({"notes": facts})

    def _write(self, event: dict[str, Any]) -> None:
        with self._lock:
            with open(self.file.local, "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.file.upload()
            self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        if "notes" in event:
            self.notes |= event["notes"]
            return
        number = event["trial"]
        if "settings" in event:
            self.trials[number] = Trial(number, event["settings"])
            return
        trial = self.trials[number]
        if "metrics" in event:
            trial.step, trial.metrics = event["step"], event["metrics"]
            trial.seconds = trial.metrics.get("seconds", 0.0)
            trial.curve.append((trial.step, trial.metrics))
            self.reports.append(Report(number, trial.step, trial.metrics))
        if "folder" in event:
            trial.status = "running"
        for name in ("folder", "run_id", "status", "error"):
            if name in event:
                setattr(trial, name, event[name])
