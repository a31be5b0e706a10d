"""The trials of a sweep under Ray Tune, which places them; what is tried, kept and stopped rests on the
journal alone.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault(
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1"
)  # its CSV, JSON and TensorBoard copies of every result
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # nor its tables on the terminal
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # its own state, which nothing reads

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from parallelmind.remote import RemotePath
from workloads.common.stopping import StopFile
from workloads.sweep.config import SweepConfig
from workloads.sweep.journal import Journal
from workloads.sweep.search import point
from workloads.sweep.trainable import Sweep, run_trial
from workloads.train.command import STOP

_TUNE = ".tune"  # Ray Tune's folder in the sweep's
_RESTARTS = 3  # of a trial whose process is lost
_EVERYTHING = 1 << 40  # steps: more than any trial takes


class _Forgotten:
    """Ray Tune pickles its parts when it starts and now and then. Of these nothing is kept: all is in the
    journal.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {}


class JournalSearcher(_Forgotten, Searcher):
    """Hands out what was begun and not ended first, then new points, each once with every seed.

    Where nothing of that is left, which is a sweep that had ended, those that failed are repeated: what they
    lacked may be there.
    """

    def __init__(self, config: SweepConfig, journal: Journal) -> None:
        super().__init__()
        self._config, self._journal = config, journal
        self._left = [trial for trial in journal.trials.values() if not trial.ended]
        if self.over():
            self._left = [trial for trial in journal.trials.values() if trial.status == "failed"]
        self.ending = False  # nothing new is begun

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a text
        if self.ending:
            return Searcher.FINISHED
        if self._left:
            trial = self._left.pop(0)
            return self._handed(trial.number, trial.settings)
        number, settings = len(self._journal.trials), self._next()
        if settings is None:
            return Searcher.FINISHED
        self._journal.begin(number, settings)
        return self._handed(number, settings)

    def _handed(self, number: int, settings: dict[str, Any]) -> dict[str, Any]:
        return {"number": number, "settings": settings, "data": self._journal.notes.get("data")}

    def over(self) -> bool:
        """Whether there is nothing to hand out."""
        return not self._left and self._next() is None

    def _next(self) -> dict[str, Any] | None:
        """The settings of the first trial that was never begun; None where the last one was."""
        number, seeds = len(self._journal.trials), self._config.seeds
        if number % len(seeds):
            found: dict[str, Any] | None = self._journal.trials[number - 1].point
        else:
            found = point(self._config, number // len(seeds), list(self._journal.trials.values()))
        return None if found is None else {**found, "seed": seeds[number % len(seeds)]}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """What ended is in the journal."""

    def save(self, checkpoint_path: str) -> None:
        """So is all else that is known."""


@dataclass(eq=False, slots=True)
class _Runner:
    """What a scheduler of Ray Tune's needs of a trial. One for each of ours, through all its restarts."""

    trial_id: str


class _NobodyWaits:
    """A scheduler's view of Ray Tune: with no trial that waits, it pauses none to make room."""

    def get_live_trials(self) -> list[TuneTrial]:
        return []


class JournalingScheduler(_Forgotten, FIFOScheduler):
    """Writes down what trials tell, and asks a scheduler of Ray Tune's who is to stop: one that has seen all
    reports so far.
    """

    def __init__(self, config: SweepConfig, journal: Journal, changed: Callable[[], None]) -> None:
        super().__init__()
        self._journal, self._changed = journal, changed
        self._inner: Any = _scheduler(config)
        self._tune = _NobodyWaits()
        self._runners: dict[int, _Runner] = {}
        # trials that were starting when the others were asked to stop are asked as soon as they can be
        self.ending = False
        for report in journal.reports:
            if self._judge(report.number, report.step, report.metrics) == TrialScheduler.STOP:
                journal.end(report.number, "stopped")

    def on_trial_result(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        number, journal = trial.config["number"], self._journal
        if "folder" in result:
            journal.placed(number, result["folder"], result["run_id"])
            if "data" in result and "data" not in journal.notes:
                journal.note(data=result["data"])
            if self.ending:
                stop_trial(result["folder"])
        decision = TrialScheduler.CONTINUE
        found = result.get("metrics") or {name: value for name, value in result.items() if _is_metric(name)}
        if found and "step" in result:
            metrics = {name: value for name, value in found.items() if math.isfinite(value)}
            fresh = journal.report(number, result["step"], metrics)
            decision = (
                self._judge(number, result["step"], metrics) if fresh and "status" not in result else decision
            )
        if result.get("status") in ("finished", "failed"):
            journal.end(number, result["status"], result.get("error"))
        elif decision == TrialScheduler.STOP:
            journal.end(number, "stopped")
        self._changed()
        return decision

    def on_trial_error(self, controller: Any, trial: TuneTrial) -> None:
        self._journal.end(trial.config["number"], "failed", f"its process was lost {_RESTARTS + 1} times")
        self._changed()

    def _judge(self, number: int, step: int, metrics: dict[str, float]) -> str:
        if number not in self._runners:
            self._runners[number] = _Runner(str(number))
            self._inner.on_trial_add(self._tune, self._runners[number])
        result = {**metrics, "step": step}
        return self._inner.on_trial_result(self._tune, self._runners[number], result)


def stop_trial(folder: str) -> None:
    """Ask one that trains there to save a checkpoint and end."""
    StopFile(RemotePath.at(folder).child(STOP)).request()


def _is_metric(name: str) -> bool:
    return name == "loss" or name == "seconds" or name.startswith("validation/")


def _scheduler(config: SweepConfig) -> TrialScheduler:
    about: dict[str, Any] = {"time_attr": "step", "metric": config.metrics[0], "mode": "min"}
    if config.stopping == "asha":
        most = config.train.optimizer.max_steps or _EVERYTHING
        return AsyncHyperBandScheduler(
            **about,
            grace_period=min(config.grace_steps, most),
            max_t=most,
            reduction_factor=config.reduction_factor,
            stop_last_trials=False,
        )
    if config.stopping == "median":
        return MedianStoppingRule(**about, grace_period=config.grace_steps, min_time_slice=_EVERYTHING)
    return FIFOScheduler()


def run_trials(
    sweep: Sweep, journal: Journal, changed: Callable[[], None], hold: Callable[[Callable[[], None]], None]
) -> None:
    """Every trial to its end. changed: called after each event.

    hold: is given a function after which no new trial begins, and those that begin at this moment are
    stopped.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    referee = JournalingScheduler(
        sweep.config, journal, changed
    )  # first: it may find that a trial that was begun is to stop
    suggestions = JournalSearcher(sweep.config, journal)

    def end() -> None:
        suggestions.ending = referee.ending = True

    hold(end)
    if suggestions.over():  # Ray Tune fails where it has nothing to do
        return
    where, system = sweep.place.pyarrow_filesystem()
    notes = sweep.place.child(_TUNE)
    notes.delete()
    trainable = tune.with_resources(functools.partial(run_trial, sweep=sweep), {"CPU": 0.1})
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=suggestions,
            scheduler=referee,
            num_samples=-1,
            max_concurrent_trials=sweep.slots,
            reuse_actors=True,  # to start a process and load all libraries takes seconds of both cores
        ),
        run_config=tune.RunConfig(
            name=_TUNE,
            storage_path=where,
            storage_filesystem=system,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=_RESTARTS),
            log_to_file=True,
        ),
    ).fit()
    notes.delete()
