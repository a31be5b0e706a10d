"""Comparing trials: the mean metrics of a point over its seeds, and the winner of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from workloads.sweep.config import SweepConfig
from workloads.sweep.trial import Trial


def group_by_point(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Groups of trials that differ only in their seed."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(repr(trial.point), []).append(trial)
    return list(groups.values())


def mean_metrics(config: SweepConfig, group: Sequence[Trial]) -> list[float] | None:
    """Mean of each objective over a point's seeds.

    None until every trial has finished or was stopped, and if a trial lacks a finite value.
    """
    if not all(trial.status in ("finished", "stopped") for trial in group):
        return None
    columns = [[trial.metrics.get(name, math.nan) for trial in group] for name in config.metrics]
    means = [fmean(column) for column in columns]
    return means if all(map(math.isfinite, means)) else None


def find_winner(config: SweepConfig, trials: Sequence[Trial]) -> Trial | None:
    """The best trial of the best point; None if no point has finished with all its seeds.

    The best point has the lowest sum of mean objectives, its best trial the lowest sum of objectives.
    """
    groups = [group for group in group_by_point(trials) if all(t.status == "finished" for t in group)]
    scored = [(sum(means), group) for group in groups if (means := mean_metrics(config, group)) is not None]
    if not scored:
        return None
    _, best_group = min(scored, key=lambda item: (item[0], item[1][0].number))
    return min(best_group, key=lambda trial: sum(trial.metrics[name] for name in config.metrics))
