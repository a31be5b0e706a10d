"""Ray Tune's searcher of a sweep: it hands out trials and journals them first."""

from __future__ import annotations

from typing import Any

import workloads.sweep.tune_env  # noqa: F401  (before Ray)

# isort: split
from ray.tune.search import Searcher

from workloads.sweep.config import SweepConfig
from workloads.sweep.journal import Journal
from workloads.sweep.search import choose_point
from workloads.sweep.stateless_pickle import StatelessPickle


class JournalSearcher(StatelessPickle, Searcher):
    """Hands out started trials that have not ended first, then new points, each once with every seed.

    If the journal shows that the sweep has ended, it hands out the failed trials again: the cause of their
    failure may have been removed. Set `stopping` to start no more trials.
    """

    def __init__(self, config: SweepConfig, journal: Journal) -> None:
        super().__init__()
        self._config, self._journal = config, journal
        self._pending = [trial for trial in journal.trials.values() if not trial.ended]
        if self.is_exhausted():
            self._pending = [trial for trial in journal.trials.values() if trial.status == "failed"]
        self.stopping = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a text
        if self.stopping:
            return Searcher.FINISHED
        if self._pending:
            trial = self._pending.pop(0)
            return self._trial_config(trial.number, trial.settings)
        number, settings = len(self._journal.trials), self._next_settings()
        if settings is None:
            return Searcher.FINISHED
        self._journal.add_trial(number, settings)
        return self._trial_config(number, settings)

    def is_exhausted(self) -> bool:
        """Whether no trial is left to hand out."""
        return not self._pending and self._next_settings() is None

    def _trial_config(self, number: int, settings: dict[str, Any]) -> dict[str, Any]:
        """The configuration that `run_trial` receives."""
        return {"number": number, "settings": settings, "data": self._journal.fingerprint(settings)}

    def _next_settings(self) -> dict[str, Any] | None:
        """The settings of the first trial that was never started; None after the last trial."""
        number, seeds = len(self._journal.trials), self._config.search_space.seeds
        point: dict[str, Any] | None
        if number % len(seeds):
            point = self._journal.trials[number - 1].point
        else:
            trials = list(self._journal.trials.values())
            point = choose_point(self._config, number // len(seeds), trials)
        return None if point is None else {**point, "seed": seeds[number % len(seeds)]}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to do: the scheduler has journaled the end."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal holds everything."""
