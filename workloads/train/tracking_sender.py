"""Send a run's metrics and result to a tracking store from a thread, so that training never waits for it."""

from __future__ import annotations

import functools
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from workloads.train.metrics_file import MetricPoint
from workloads.train.run_dir import RunDir

_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0
_FLUSH_S = 20.0  # at the end of a run


class TrackedRun(Protocol):
    """A run in a tracking store: what `Tracker` and `WandbRun` share."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, time_ms: int) -> None: ...

    def log_folder(self, folder: Path, name: str) -> None: ...

    def log_file(self, path: Path) -> None: ...

    def finish(self, status: str = "FINISHED") -> None: ...


class TrackingSender(ABC):
    """Sends the points of a run in order, and its result.

    If the store refuses them, training continues and the sender tries again. What is left at the end
    is listed in the run's folder; `workloads.train.run` sends it when the same command is given again.

    points: grows while the run trains; call `wake` then.
    """

    name: ClassVar[str]  # of the store, in printed lines

    def __init__(
        self, run_dir: RunDir, points: Sequence[MetricPoint], print_line: Callable[[str], None]
    ) -> None:
        self._run_dir, self._points, self._print_line = run_dir, points, print_line
        self._run: TrackedRun | None = None
        self._sent = 0
        self._problem = ""
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._send_until_closed, daemon=True)

    @abstractmethod
    def _open(self) -> TrackedRun:
        """Connect to the run; may fail, and is repeated then."""

    @abstractmethod
    def _explain(self, error: Exception) -> str:
        """Why the store failed, in a few words and without passwords."""

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def wake(self) -> None:
        """Have new points sent."""
        with self._changed:
            self._changed.notify()

    def close(self, status: str) -> None:
        """Send what is left, for some seconds. May be called twice. status: that the run is left with."""
        self._flush()

    def finish(self, result: Path) -> None:
        """Send what is left, store the result and the loss plot, and end the run; list what is not stored."""
        self._flush()
        missing = self._points[self._sent :]
        if not missing:
            self._attempt(lambda run: _store_result(run, self._run_dir, result))
        elif not self._problem:
            self._problem = f"not sent within {_FLUSH_S:.0f} s"
        file = self._run_dir.unsent_file(self.name)
        if self._problem:
            self._list_missing(len(missing))
        else:
            file.local.unlink(missing_ok=True)
            file.delete_remote()

    def _flush(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_FLUSH_S)

    def _send_until_closed(self) -> None:
        delay = _FIRST_RETRY_S
        while True:
            closing = self._closing
            is_sent = self._attempt(self._send)
            if closing:
                return
            delay = _FIRST_RETRY_S if is_sent else min(2 * delay, _LAST_RETRY_S)
            # After a failure only the time counts: new metrics are no reason to try again.
            wakes = functools.partial(self._is_closing_or_behind, is_sent)
            with self._changed:
                self._changed.wait_for(wakes, None if is_sent else delay)

    def _is_closing_or_behind(self, is_sent: bool) -> bool:
        return self._closing or (is_sent and self._sent < len(self._points))

    def _send(self, run: TrackedRun) -> None:
        while self._sent < len(self._points):
            point = self._points[self._sent]
            run.log_metrics(point.metrics, point.step, point.time_ms)
            self._sent += 1

    def _attempt(self, work: Callable[[TrackedRun], None]) -> bool:
        """Do the work with the run; returns whether the store took it. Prints the first failure."""
        try:
            # Opened again after a failure: it may not be known whether the store has the last point.
            self._run = self._run or self._open()
            work(self._run)
        except Exception as error:  # a failure of the library does not end training
            self._run = None
            if not self._problem:
                self._print_line(
                    f"{self.name}: {self._explain(error)}; training goes on, and its metrics are kept in "
                    f"{self._run_dir.metrics_file}"
                )
            self._problem = self._explain(error)
            return False
        if self._problem:
            self._print_line(f"{self.name}: answers again; everything is sent")
        self._problem = ""
        return True

    def _list_missing(self, points: int) -> None:
        """Write what the store lacks to the run's folder, and print it."""
        file = self._run_dir.unsent_file(self.name)
        missing = {"metric_points": points, "result": self._run_dir.result_name, "reason": self._problem}
        file.local.write_text(json.dumps(missing) + "\n", encoding="utf-8")
        file.upload()
        self._print_line(
            f"{self.name}: lacks {points} points of metrics, and the {self._run_dir.result_name} "
            f"({self._problem}); the same command sends them, {file} lists them"
        )


def _store_result(run: TrackedRun, run_dir: RunDir, result: Path) -> None:
    run.log_folder(result, run_dir.result_name)
    run.log_file(run_dir.loss_plot.local)
    run.finish()
