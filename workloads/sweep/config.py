"""What a sweep tries: the settings of a training run, the space around them, and who chooses what comes
next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import product
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator, model_validator

from parallelmind.config import FrozenConfig, TrainConfig, did_you_mean, resolve
from parallelmind.errors import UserError, format_value

_FIXED = TrainConfig.NON_IDENTITY_FIELDS | set(
    "name seed strict max_bad_records validation_path validation_branches validation_samples validate_every".split()
)  # say where, or what trials are compared by
SWEEPABLE = frozenset(TrainConfig.flat_fields()) - _FIXED


class Between(FrozenConfig):
    """Any number of a range; whole ones where the field holds whole ones."""

    low: float = Field(description="smallest")
    high: float = Field(description="largest")
    log: bool = Field(False, description="draw the logarithm evenly")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            given = f"low={self.low:g} high={self.high:g} log={format_value(self.log)}"
            raise ValueError(f"space: {given}: is no range; give low < high, and above 0 with log")
        return self


class SweepConfig(FrozenConfig):
    """A whole sweep. It may be gone on with on more slots, and with more trials, than it was begun with."""

    NON_IDENTITY_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"trials", "cpus_per_trial", "max_concurrent", "register_as", "alias"}
    )

    name: str = Field(
        "sweep", pattern=r"^[A-Za-z0-9._-]+$", description="name of the sweep; its folder is name-confighash"
    )
    train: TrainConfig = Field(description="the training run that every trial is, but for what is swept")
    space: dict[str, list[Any] | Between] = Field(
        {}, description="values to try by field: a list, or {low, high, log}"
    )
    points: list[dict[str, Any]] = Field(
        [], description="settings to try as they are; grid: the lists of space over each"
    )
    seeds: list[NonNegativeInt] = Field(
        [0], min_length=1, description="every point is trained with each of these"
    )
    search: Literal["grid", "random", "optuna"] = Field(
        "grid", description="who chooses the points (optuna: TPE)"
    )
    trials: int | None = Field(
        None, ge=1, description="random, optuna: how many points to try, `points` included"
    )
    search_seed: int = Field(0, ge=0, description="random, optuna: seed of what is drawn")
    metrics: list[str] = Field(
        ["validation/loss_1", "validation/branch_tax_8"],
        min_length=1,
        description="what to make small; their sum decides",
    )
    stopping: Literal["none", "asha", "median"] = Field(
        "none", description="how trials behind the others are ended early"
    )
    grace_steps: int = Field(50, ge=1, description="steps that every trial may take")
    reduction_factor: int = Field(
        3, ge=2, description="asha: one in so many goes on, after grace_steps times 1, 3, 9, …"
    )
    cpus_per_trial: int = Field(1, ge=1, description="CPUs that a trial computes with, its workers together")
    max_concurrent: int | None = Field(None, ge=1, description="most trials at a time; null: as many as fit")
    register_as: str | None = Field(
        "parallelmind",
        pattern="^[^/:']+$",
        description="registered model that the winner becomes a version of",
    )
    alias: str = Field("champion", pattern=r"^[\w-]+$", description="alias of that version")

    @field_validator("space", "points")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        where = info.field_name
        for name in [name for part in (value if isinstance(value, list) else [value]) for name in part]:
            if name not in TrainConfig.flat_fields():
                near = did_you_mean(name, TrainConfig)
                raise ValueError(f"{where}.{name}: unknown field{near}; workloads.train --help lists them")
            if name not in SWEEPABLE:
                remedy = "repeat with seeds=[…]" if name == "seed" else "set it in train"
                raise ValueError(f"{where}.{name}: cannot differ between trials; {remedy}")
        return value

    @field_validator("alias")
    @classmethod
    def _free(cls, value: str) -> str:
        if re.fullmatch(r"latest|v\d+", value, re.IGNORECASE):
            raise ValueError(f"alias={value}: means a version by itself in MLflow; choose another name")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.space and not self.points:
            raise ValueError("space: nothing to try; give space={field: [values]} or points=[{field: value}]")
        if self.search == "grid":
            ranges = [name for name, values in self.space.items() if isinstance(values, Between)]
            if ranges or self.trials:
                field = f"space.{ranges[0]}: a range" if ranges else f"trials={self.trials}:"
                raise ValueError(
                    f"{field} needs search=random or search=optuna; a grid tries every value of its lists"
                )
        elif self.trials is None or not self.space:
            raise ValueError(
                f"search={self.search}: draws points from a space; give trials=NUMBER and space={{field: [values]}}"
            )
        if empty := [name for name, values in self.space.items() if values == []]:
            raise ValueError(f"space.{empty[0]}=[]: holds nothing to try; give at least one value")
        if unknown := [name for name in self.metrics if name not in self._reported()]:
            raise ValueError(
                f"metrics={unknown[0]}: no trial reports it; choose from {', '.join(self._reported())}"
            )
        return self

    def _reported(self) -> list[str]:
        """The metrics that every trial can be compared by."""
        if self.train.data.validation_path is None:
            return ["loss"]
        counts = sorted(set(self.train.metrics.validation_branches))
        taxed = [count for count in counts if count > 1 and counts[0] == 1]
        return [
            "loss",
            *(f"validation/loss_{count}" for count in counts),
            *(f"validation/branch_tax_{n}" for n in taxed),
        ]

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the lists, over each of the points."""
        lists = {name: values for name, values in self.space.items() if isinstance(values, list)}
        for point in self.points or [{}]:
            for values in product(*lists.values()):
                yield {**point, **dict(zip(lists, values, strict=True))}

    def trial(self, number: int, settings: dict[str, Any], output_dir: str) -> TrainConfig:
        """The run of a trial. Raises UserError for settings that no run can have."""
        given = {
            **self.train.model_dump(mode="json"),
            **settings,
            "name": f"{self.name}-{number:03}",
            "output_dir": output_dir,
        }
        return resolve(TrainConfig, given, source=f"trial {number}")


def check(config: SweepConfig) -> None:
    """Raises UserError unless every value of the space alone, every point, and all of a grid can be trained
    with.
    """
    if config.search == "grid":
        tried = list(config.grid())
    else:
        tried = [
            *config.points,
            *({name: value} for name, values in config.space.items() for value in _ends(name, values)),
        ]
    for settings in tried:
        try:
            config.trial(0, settings, config.train.run.output_dir)
        except UserError as error:
            told = " ".join(f"{name}={format_value(value)}" for name, value in settings.items())
            raise UserError(f"space: {told}: {error}") from error


def _ends(name: str, values: list[Any] | Between) -> list[Any]:
    return values if isinstance(values, list) else [number(name, values.low), number(name, values.high)]


def is_whole(name: str) -> bool:
    """Whether a field holds whole numbers."""
    return "float" not in str(TrainConfig.flat_fields()[name].annotation)


def number(name: str, value: float) -> float | int:
    """A drawn number as the field holds it."""
    return math.floor(value) if is_whole(name) else value
