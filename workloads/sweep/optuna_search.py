"""Points that optuna's TPE sampler suggests from the results so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from workloads.sweep.config import Between, SweepConfig
from workloads.sweep.ranking import group_by_point, mean_metrics
from workloads.sweep.space import is_integer_field
from workloads.sweep.trial import Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)


def suggest_point(config: SweepConfig, index: int, trials: Sequence[Trial]) -> dict[str, Any]:
    """Suggest point number `index` from a study of all points so far.

    The study is rebuilt every time. It has one objective per metric. Points without results count as bad
    (`constant_liar`), so that points suggested meanwhile differ from them.
    """
    sampler = optuna.samplers.TPESampler(seed=config.strategy.search_seed + index, constant_liar=True)
    study = optuna.create_study(directions=["minimize"] * len(config.metrics), sampler=sampler)
    distributions = {name: _distribution(name, values) for name, values in config.search_space.space.items()}
    for group in group_by_point(trials):
        if known := _study_trial(config, group, distributions):
            study.add_trial(known)
    suggested = study.ask(distributions)
    return {name: _decode(config.search_space.space[name], value) for name, value in suggested.params.items()}


def _study_trial(
    config: SweepConfig, group: Sequence[Trial], distributions: Mapping[str, BaseDistribution]
) -> FrozenTrial | None:
    """The point of a group for the study; None if it lies outside the space, as one of `points` may."""
    settings = group[0].settings
    if not all(
        name in settings and _contains(values, settings[name])
        for name, values in config.search_space.space.items()
    ):
        return None
    params = {name: _encode(values, settings[name]) for name, values in config.search_space.space.items()}
    means = mean_metrics(config, group)
    if means is not None:
        return create_trial(params=params, distributions=dict(distributions), values=means)
    state = TrialState.FAIL if all(trial.ended for trial in group) else TrialState.RUNNING
    return create_trial(state=state, params=params, distributions=dict(distributions))


def _distribution(name: str, values: list[Any] | Between) -> BaseDistribution:
    if isinstance(values, list):
        # Optuna does not accept lists and mappings as categories, so a value is encoded by its index.
        return CategoricalDistribution(range(len(values)))
    if is_integer_field(name):
        return IntDistribution(math.ceil(values.low), math.floor(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _contains(values: list[Any] | Between, value: Any) -> bool:
    if isinstance(values, list):
        return value in values
    return isinstance(value, int | float) and values.low <= value <= values.high


def _encode(values: list[Any] | Between, value: Any) -> Any:
    return values.index(value) if isinstance(values, list) else value


def _decode(values: list[Any] | Between, encoded: Any) -> Any:
    return values[encoded] if isinstance(values, list) else encoded
