"""Ray Tune's scheduler of a sweep: it journals reports and decides which trials stop early."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import workloads.sweep.tune_env  # noqa: F401  (before Ray)

# isort: split
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from parallelmind.redaction import redact_uri
from parallelmind.remote import RemotePath
from workloads.sweep.config import SweepConfig
from workloads.sweep.journal import Journal
from workloads.sweep.stateless_pickle import StatelessPickle
from workloads.sweep.trial import Status
from workloads.train.run_dir import stop_file

MAX_RESTARTS = 3  # of a trial whose process is lost
_NO_STEP_LIMIT = 1 << 40  # more steps than any trial takes


@dataclass(eq=False, slots=True)
class _ScheduledTrial:
    """The part of a Tune trial that a stopping rule reads. One per trial of the sweep, over all restarts."""

    trial_id: str


class _NoLiveTrials:
    """A Tune controller as a stopping rule sees it: without waiting trials, none is paused to make room."""

    def get_live_trials(self) -> list[TuneTrial]:
        return []


class JournalingScheduler(StatelessPickle, FIFOScheduler):
    """Journals what trials report, and asks a stopping rule of Ray Tune which trials to stop.

    The stopping rule receives every report of the journal, in its order and after it was journaled. A rule
    that is rebuilt from the journal therefore decides alike: an interruption changes nothing. on_change:
    called with the number of a trial after each of its events. Set `stopping` to stop trials that are still
    starting.
    """

    def __init__(self, config: SweepConfig, journal: Journal, on_change: Callable[[int], None]) -> None:
        super().__init__()
        self._journal, self._on_change = journal, on_change
        self._rule: Any = _stopping_rule(config)
        self._controller = _NoLiveTrials()
        self._scheduled: dict[int, _ScheduledTrial] = {}
        self.stopping = False
        for report in journal.reports:
            self._apply_rule(report.number, report.step, report.metrics)

    def on_trial_result(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        number = trial.config["number"]
        if "folder" in result:
            self._record_start(number, result)
        if "restart" in result:
            self._journal.add_restart(number, result["restart"])
        self._record_metrics(number, result)
        if result.get("status") in ("finished", "failed"):
            self._journal.end_trial(number, result["status"], result.get("error"))
        self._on_change(number)
        stopped = self._journal.trials[number].status == "stopped"
        return TrialScheduler.STOP if stopped else TrialScheduler.CONTINUE

    def on_trial_error(self, controller: Any, trial: TuneTrial) -> None:
        error = f"its process was lost {MAX_RESTARTS + 1} times"
        self._journal.end_trial(trial.config["number"], "failed", error)
        self._on_change(trial.config["number"])

    def _record_start(self, number: int, result: dict[str, Any]) -> None:
        self._journal.set_location(number, redact_uri(result["folder"]), result["run_id"])
        if "data" in result:
            self._journal.keep_fingerprint(number, result["data"])
        if self.stopping:
            stop_trial(result["folder"])

    def _record_metrics(self, number: int, result: dict[str, Any]) -> None:
        """Journal the metrics of a result, and then end the trial if the stopping rule says so.

        The last result of a run is one event with its status: a crash cannot separate the two.
        """
        reported = {
            name: value for name, value in (result.get("metrics") or result).items() if _is_metric(name)
        }
        if not reported or "step" not in result:
            return
        metrics = {name: value for name, value in reported.items() if math.isfinite(value)}
        status: Status | None = "finished" if result.get("status") == "finished" else None
        if self._journal.add_report(number, result["step"], metrics, status):
            self._apply_rule(number, result["step"], metrics)

    def _apply_rule(self, number: int, step: int, metrics: dict[str, float]) -> None:
        """Pass a journaled report to the stopping rule, and end the trial if it says so."""
        if number not in self._scheduled:
            self._scheduled[number] = _ScheduledTrial(str(number))
            self._rule.on_trial_add(self._controller, self._scheduled[number])
        result = {**metrics, "step": step}
        decision = self._rule.on_trial_result(self._controller, self._scheduled[number], result)
        if decision == TrialScheduler.STOP:
            self._journal.end_trial(number, "stopped")


def stop_trial(folder: str) -> None:
    """Ask the trial that trains in this folder to save a checkpoint and end."""
    stop_file(RemotePath.at(folder)).request()


def _is_metric(name: str) -> bool:
    return name == "loss" or name == "seconds" or name.startswith("validation/")


def _stopping_rule(config: SweepConfig) -> TrialScheduler:
    options: dict[str, Any] = {"time_attr": "step", "metric": config.metrics[0], "mode": "min"}
    if config.early_stopping.stopping == "asha":
        max_steps = config.train.optimizer.max_steps or _NO_STEP_LIMIT
        return AsyncHyperBandScheduler(
            **options,
            grace_period=min(config.early_stopping.grace_steps, max_steps),
            max_t=max_steps,
            reduction_factor=config.early_stopping.reduction_factor,
            stop_last_trials=False,
        )
    if config.early_stopping.stopping == "median":
        return MedianStoppingRule(
            **options, grace_period=config.early_stopping.grace_steps, min_time_slice=_NO_STEP_LIMIT
        )
    return FIFOScheduler()
