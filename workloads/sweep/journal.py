"""The journal of a sweep: one JSON line per event, on disk before anything depends on the event.

Ray Tune saves its own state as a pickle from time to time. After a crash that state would repeat or forget
trials, so a sweep never reads it and resumes from the journal alone.
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
class MetricsReport:
    """The metrics that a trial reported at a step."""

    number: int
    step: int
    metrics: dict[str, float]


@dataclass(slots=True)
class Journal:
    """Create it with `open`. Methods may be called from any thread.

    reports: those of all trials, in the order of arrival. notes: facts about the whole sweep.
    """

    file: RemotePath
    trials: dict[int, Trial] = field(default_factory=dict)
    reports: list[MetricsReport] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, file: RemotePath) -> Journal:
        """Replay the journal. A last line that a crash cut short is removed: its event did not happen."""
        journal, path = cls(file), file.local
        if file.uri is not None:
            path.write_bytes(file.read_bytes() or b"")
        if path.is_file():
            complete, _, cut_line = path.read_bytes().rpartition(b"\n")
            if cut_line:
                os.truncate(path, len(complete) + 1 if complete else 0)
            for line in complete.splitlines():
                journal._apply(json.loads(line))
        return journal

    def add_trial(self, number: int, settings: dict[str, Any]) -> None:
        self._append({"trial": number, "settings": settings})

    def set_location(self, number: int, folder: str, run_id: str) -> None:
        """Record the run folder and the MLflow run of a trial, which is running from now on."""
        self._append({"trial": number, "folder": folder, "run_id": run_id})

    def add_report(self, number: int, step: int, metrics: Mapping[str, float]) -> bool:
        """Record metrics. Returns False for a step that a trial repeats after a crash, which is dropped."""
        is_new = step > self.trials[number].step
        if is_new:
            self._append({"trial": number, "step": step, "metrics": dict(metrics)})
        return is_new

    def end_trial(self, number: int, status: Status, error: str | None = None) -> None:
        """Record how a trial ended, unless it has ended already."""
        if not self.trials[number].ended:
            self._append({"trial": number, "status": status, "error": error})

    def add_notes(self, **notes: Any) -> None:
        """Record facts about the whole sweep."""
        self._append({"notes": notes})

    def _append(self, event: dict[str, Any]) -> None:
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
            self.reports.append(MetricsReport(number, trial.step, trial.metrics))
        if "folder" in event:
            trial.status = "running"
        for name in ("folder", "run_id", "status", "error"):
            if name in event:
                setattr(trial, name, event[name])
