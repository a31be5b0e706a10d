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

from parallelmind.remote import RemotePath
from workloads.sweep.config import SweepConfig
from workloads.sweep.journal import Journal
from workloads.sweep.stateless_pickle import StatelessPickle
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

    The stopping rule is rebuilt from all reports of the journal, so an interruption does not change its
    decisions. on_change: called after each event. Set `stopping` to stop trials that are still starting.
    """

    def __init__(self, config: SweepConfig, journal: Journal, on_change: Callable[[], None]) -> None:
        super().__init__()
        self._journal, self._on_change = journal, on_change
        self._rule: Any = _stopping_rule(config)
        self._controller = _NoLiveTrials()
        self._scheduled: dict[int, _ScheduledTrial] = {}
        self.stopping = False
        for report in journal.reports:
            if self._apply_rule(report.number, report.step, report.metrics) == TrialScheduler.STOP:
                journal.end_trial(report.number, "stopped")

    def on_trial_result(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        number = trial.config["number"]
        if "folder" in result:
            self._record_start(number, result)
        decision = self._record_metrics(number, result)
        if result.get("status") in ("finished", "failed"):
            self._journal.end_trial(number, result["status"], result.get("error"))
        elif decision == TrialScheduler.STOP:
            self._journal.end_trial(number, "stopped")
        self._on_change()
        return decision

    def on_trial_error(self, controller: Any, trial: TuneTrial) -> None:
        error = f"its process was lost {MAX_RESTARTS + 1} times"
        self._journal.end_trial(trial.config["number"], "failed", error)
        self._on_change()

    def _record_start(self, number: int, result: dict[str, Any]) -> None:
        self._journal.set_location(number, result["folder"], result["run_id"])
        if "data" in result and "data" not in self._journal.notes:
            self._journal.add_notes(data=result["data"])
        if self.stopping:
            stop_trial(result["folder"])

    def _record_metrics(self, number: int, result: dict[str, Any]) -> str:
        """Journal the metrics of a result; returns whether the trial continues or stops."""
        reported = result.get("metrics") or {
            name: value for name, value in result.items() if _is_metric(name)
        }
        if not reported or "step" not in result:
            return TrialScheduler.CONTINUE
        metrics = {name: value for name, value in reported.items() if math.isfinite(value)}
        is_new = self._journal.add_report(number, result["step"], metrics)
        if not is_new or "status" in result:
            return TrialScheduler.CONTINUE
        return self._apply_rule(number, result["step"], metrics)

    def _apply_rule(self, number: int, step: int, metrics: dict[str, float]) -> str:
        if number not in self._scheduled:
            self._scheduled[number] = _ScheduledTrial(str(number))
            self._rule.on_trial_add(self._controller, self._scheduled[number])
        result = {**metrics, "step": step}
        return self._rule.on_trial_result(self._controller, self._scheduled[number], result)


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
