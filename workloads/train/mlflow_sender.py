"""Send a run's metrics and result to MLflow from a thread, so that training never waits for the server."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.train.metrics_file import MetricsFile
from workloads.train.run_dir import RunDir

if TYPE_CHECKING:
    from parallelmind.tracking import Tracker

_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0
_FLUSH_S = 20.0  # at the end of a run


class MlflowSender:
    """Writes metrics to the run's folder at once, and sends them in order.

    While MLflow does not take them, training goes on and the sender tries again. What is left at the end is
    listed in the run's folder; `workloads.train.run` sends it when the same command is given again.
    """

    def __init__(self, run_dir: RunDir, uri: str, run_id: str, print_line: Callable[[str], None]) -> None:
        self._run_dir, self._uri, self._run_id, self._print_line = run_dir, uri, run_id, print_line
        self._metrics = MetricsFile(run_dir.metrics_file)
        self._tracker: Tracker | None = None
        self._sent = 0
        self._problem = ""
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write metrics to the run's folder, and have them sent."""
        with self._changed:
            self._metrics.append(metrics, step)
            self._changed.notify()

    def close(self) -> None:
        """Send what is left, for some seconds; list what MLflow lacks then. May be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_FLUSH_S)
        self._run_dir.metrics_file.upload()

    def finish(self, result: Path) -> None:
        """Close, then store the result and the loss plot, and end the MLflow run; list what is not stored."""
        self.close()
        missing = self._metrics.points[self._sent :]
        if not missing:
            self._attempt(lambda tracker: _store_result(tracker, self._run_dir, result))
        elif not self._problem:
            self._problem = f"not sent within {_FLUSH_S:.0f} s"
        if self._problem:
            self._list_missing(len(missing))
        else:
            self._run_dir.unsent_file.local.unlink(missing_ok=True)
            self._run_dir.unsent_file.delete_remote()

    def _run(self) -> None:
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
        return self._closing or (is_sent and self._sent < len(self._metrics.points))

    def _send(self, tracker: Tracker) -> None:
        while self._sent < len(self._metrics.points):
            point = self._metrics.points[self._sent]
            tracker.log_metrics(point.metrics, point.step, point.time_ms)
            self._sent += 1

    def _attempt(self, work: Callable[[Tracker], None]) -> bool:
        """Do the work with the tracker; returns whether MLflow took it. Prints the first failure."""
        from parallelmind.tracking import Tracker, store_problem

        try:
            # Opened again after a failure: it may not be known whether the store has the last point.
            self._tracker = self._tracker or Tracker(self._uri, self._run_id)
            work(self._tracker)
        except Exception as error:  # whatever MLflow raises, training goes on
            self._tracker = None
            if not self._problem:
                self._print_line(
                    f"mlflow: {store_problem(error)}; training goes on, and its metrics are kept in "
                    f"{self._run_dir.metrics_file}"
                )
            self._problem = store_problem(error)
            return False
        if self._problem:
            self._print_line("mlflow: answers again; everything is sent")
        self._problem = ""
        return True

    def _list_missing(self, points: int) -> None:
        """Write what MLflow lacks to the run's folder, and print it."""
        file = self._run_dir.unsent_file
        missing = {"metric_points": points, "result": self._run_dir.result_name, "reason": self._problem}
        file.local.write_text(json.dumps(missing) + "\n", encoding="utf-8")
        file.upload()
        self._print_line(
            f"mlflow: lacks {points} points of metrics, and the {self._run_dir.result_name} "
            f"({self._problem}); the same command sends them, {file} lists them"
        )


def _store_result(tracker: Tracker, run_dir: RunDir, result: Path) -> None:
    tracker.log_folder(result, run_dir.result_name)
    tracker.log_file(run_dir.loss_plot.local)
    tracker.finish()
