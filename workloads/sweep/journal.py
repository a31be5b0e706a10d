"""The journal of a sweep: one JSON line per event, on disk before anything depends on the event.

Ray Tune saves its own state as a pickle from time to time. After a crash that state would repeat or forget
trials, so a sweep never reads it and resumes from the journal alone.
"""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from workloads.sweep.journal_file import JournalFile
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

    An event is applied after it has been written, and as it would be read again: the state equals that of a
    replay. An event that cannot be written raises UserError and has not happened.

    reports: those of all trials, in the order of arrival. notes: facts about the whole sweep. error: why the
    first event that was not written was not.
    """

    file: RemotePath
    trials: dict[int, Trial] = field(default_factory=dict)
    reports: list[MetricsReport] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    error: UserError | None = None
    _lines: JournalFile = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._lines = JournalFile(self.file)

    @classmethod
    def open(cls, file: RemotePath) -> Journal:
        """Replay the events. A last line that is no whole event is removed: its event did not happen.

        Raises UserError for a whole event that this version does not know.
        """
        journal = cls(file)
        content = journal._lines.read()
        end = 0
        for number, line in enumerate(io.BytesIO(content), 1):
            event = _parse_event(line)
            if event is None:
                break
            journal._replay(event, number)
            end += len(line)
        kept = journal._lines.start(content, end)
        if end < len(content):
            place = f"moved to {kept}" if kept else "removed"
            print(
                f"note: {file}: its last {len(content) - end} bytes hold no whole event and are {place}",
                file=sys.stderr,
            )
        return journal

    def add_trial(self, number: int, settings: dict[str, Any]) -> None:
        self._append({"trial": number, "settings": settings})

    def set_location(self, number: int, folder: str, run_id: str) -> None:
        """Record the run folder and the MLflow run of a trial, which is running from now on."""
        self._append({"trial": number, "folder": folder, "run_id": run_id})

    def add_report(
        self, number: int, step: int, metrics: Mapping[str, float], status: Status | None = None
    ) -> bool:
        """Record metrics, and the status of a trial that ends with them.

        Returns whether the step is new. One that a trial repeats after a crash is dropped. The last report of
        a trial replaces an earlier one of its step, which may lack the validation.
        """
        trial = self.trials[number]
        is_new = step > trial.step
        if is_new or (status and not trial.ended and metrics != trial.metrics):
            end = {"status": status, "error": None} if status else {}
            self._append({"trial": number, "step": step, "metrics": dict(metrics), **end})
        elif status:
            self.end_trial(number, status)
        return is_new

    def add_restart(self, number: int, line: str) -> None:
        """Record that a trial lost a process and restarts. line: what was lost, and why."""
        self._append({"trial": number, "restart": line})

    def end_trial(self, number: int, status: Status, error: str | None = None) -> None:
        """Record how a trial ended, unless it has ended already."""
        if not self.trials[number].ended:
            self._append({"trial": number, "status": status, "error": error})

    def add_notes(self, **notes: Any) -> None:
        """Record facts about the whole sweep."""
        self._append({"notes": notes})

    def fingerprint(self, settings: Mapping[str, Any]) -> str | None:
        """The fingerprint of the data that a trial with these settings shares with earlier ones, if known."""
        value: str | None = self.notes.get(_data_note(settings))
        return value

    def keep_fingerprint(self, number: int, fingerprint: str) -> None:
        """Record the fingerprint of a trial's data, unless that of another trial with the same files is."""
        name = _data_note(self.trials[number].settings)
        if name not in self.notes:
            self.add_notes(**{name: fingerprint})

    def _append(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        with self._lock:
            try:
                self._lines.append(line)
            except UserError as error:
                self.error = self.error or error
                raise
            self._apply(json.loads(line))

    def _replay(self, event: dict[str, Any], number: int) -> None:
        try:
            self._apply(event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.file.field}={self.file}: line {number} is not an event of this version ({error!r}); "
                "use the version that wrote it, or give another name"
            ) from error

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
            if trial.curve and trial.curve[-1][0] == trial.step:
                trial.curve.pop()
            else:
                self.reports.append(MetricsReport(number, trial.step, trial.metrics))
            trial.curve.append((trial.step, trial.metrics))
        if "folder" in event:
            trial.status, trial.error = "running", None
        if "restart" in event:
            trial.restarts.append(event["restart"])
        for name in ("folder", "run_id", "status", "error"):
            if name in event:
                setattr(trial, name, event[name])


def _parse_event(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None if the line was not written whole."""
    try:
        event = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _data_note(settings: Mapping[str, Any]) -> str:
    """The note with the fingerprint of a trial's data; trials with other files have one of their own."""
    return f"data {settings['data_path']}" if "data_path" in settings else "data"
