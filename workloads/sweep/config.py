"""Configuration of a sweep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator, model_validator

from parallelmind.config import FrozenConfig, GroupedConfig, TrainConfig, did_you_mean, resolve
from parallelmind.errors import format_value

# Fields that trials share: where and how a run happens, and what trials are compared by.
_SHARED_FIELDS = TrainConfig.NON_IDENTITY_FIELDS - {"accumulation_steps"} | {
    "seed",
    "strict",
    "max_bad_records",
    "validation_path",
    "validation_branches",
    "validation_samples",
    "validate_every",
}
SWEEPABLE_FIELDS = frozenset(TrainConfig.flat_fields()) - _SHARED_FIELDS


class Between(FrozenConfig):
    """A range of numbers; for an integer field, of integers."""

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    log: bool = Field(False, description="draw uniformly from the logarithm")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            given = f"low={self.low:g} high={self.high:g} log={format_value(self.log)}"
            raise ValueError(f"space: {given}: is no range; give low < high, and above 0 with log")
        return self


class SearchSpaceConfig(FrozenConfig):
    """Search space."""

    space: dict[str, list[Any] | Between] = Field(
        {}, description="values to try, by field: a list, or {low, high, log}"
    )
    points: list[dict[str, Any]] = Field(
        [], description="settings to try as they are; a grid combines each with the lists of space"
    )
    seeds: list[NonNegativeInt] = Field([0], min_length=1, description="seeds to train every point with")

    @field_validator("space", "points")
    @classmethod
    def _check_field_names(cls, value: Any, info: ValidationInfo) -> Any:
        mappings = value if isinstance(value, list) else [value]
        for name in [name for mapping in mappings for name in mapping]:
            if name not in TrainConfig.flat_fields():
                suggestion = did_you_mean(name, TrainConfig)
                raise ValueError(
                    f"{info.field_name}.{name}: unknown field{suggestion}; workloads.train --help lists them"
                )
            if name not in SWEEPABLE_FIELDS:
                remedy = "repeat with seeds=[…]" if name == "seed" else "set it in train"
                raise ValueError(f"{info.field_name}.{name}: cannot differ between trials; {remedy}")
        return value

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        if not self.space and not self.points:
            raise ValueError("space: nothing to try; give space={field: [values]} or points=[{field: value}]")
        if empty := [name for name, values in self.space.items() if values == []]:
            raise ValueError(f"space.{empty[0]}=[]: has no values; give at least one")
        return self

    def values_of(self, name: str, default: Any) -> list[Any]:
        """The values that a field has in the trials. default: in those that do not set it."""
        swept = self.space.get(name)
        values = swept if isinstance(swept, list) else []
        return [*values, *(point.get(name, default) for point in self.points)] or [default]

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the lists of `space`, for each of `points`."""
        lists = {name: values for name, values in self.space.items() if isinstance(values, list)}
        for point in self.points or [{}]:
            for values in product(*lists.values()):
                yield {**point, **dict(zip(lists, values, strict=True))}


class SearchStrategyConfig(FrozenConfig):
    """Search strategy."""

    search: Literal["grid", "random", "optuna"] = Field(
        "grid", description="how points are chosen (optuna: TPE sampler)"
    )
    trials: int | None = Field(
        None, ge=1, description="random, optuna: number of points to try, including `points`"
    )
    search_seed: int = Field(0, ge=0, description="random, optuna: seed of the search")


class EarlyStoppingConfig(FrozenConfig):
    """Early stopping of trials."""

    stopping: Literal["none", "asha", "median"] = Field(
        "none", description="rule that stops trials early when they fall behind"
    )
    grace_steps: int = Field(50, ge=1, description="optimizer steps before a trial may be stopped")
    reduction_factor: int = Field(
        3, ge=2, description="asha: one in this many trials passes each rung (grace_steps times 1, 3, 9, …)"
    )


class TrialResourcesConfig(FrozenConfig):
    """Resources of trials."""

    cpus_per_trial: int = Field(1, ge=1, description="CPUs of a trial, for all its workers together")
    max_concurrent: int | None = Field(
        None, ge=1, description="most trials at a time; null: as many as fit on the cluster"
    )


class RegistryConfig(FrozenConfig):
    """Model registry."""

    register_as: str | None = Field(
        "parallelmind",
        pattern="^[^/:']+$",
        description="registered model that gets the winner as a new version; null: none",
    )
    alias: str = Field("champion", pattern=r"^[\w-]+$", description="alias of that version")

    @field_validator("alias")
    @classmethod
    def _check_alias(cls, value: str) -> str:
        if re.fullmatch(r"latest|v\d+", value, re.IGNORECASE):
            raise ValueError(f"alias={value}: is reserved by MLflow; choose another name")
        return value


class SweepConfig(GroupedConfig):
    """Sweep. It may resume with more trials, and with more of them at a time.

    The order of groups and fields is the order in config.yaml.
    """

    NON_IDENTITY_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"trials", "cpus_per_trial", "max_concurrent", "register_as", "alias"}
    )

    name: str = Field(
        "sweep", pattern=r"^[A-Za-z0-9._-]+$", description="name of the sweep; its folder is name-confighash"
    )
    train: TrainConfig = Field(description="settings of the training run that all trials share")
    search_space: SearchSpaceConfig
    strategy: SearchStrategyConfig
    metrics: list[str] = Field(
        ["validation/loss_1", "validation/branch_tax_8"],
        min_length=1,
        description="metrics to minimize; the winner has the lowest sum",
    )
    early_stopping: EarlyStoppingConfig
    resources: TrialResourcesConfig
    registry: RegistryConfig

    if TYPE_CHECKING:  # flat field names, which the type checker cannot know

        def __init__(self, **fields: Any) -> None: ...

    @model_validator(mode="after")
    def _check_strategy(self) -> Self:
        search, trials, space = self.strategy.search, self.strategy.trials, self.search_space.space
        if search == "grid":
            ranges = [name for name, values in space.items() if isinstance(values, Between)]
            if ranges or trials:
                field = f"space.{ranges[0]}: a range" if ranges else f"trials={trials}:"
                raise ValueError(
                    f"{field} needs search=random or search=optuna; a grid tries every value of its lists"
                )
            if twice := [name for name in space if any(name in point for point in self.search_space.points)]:
                raise ValueError(
                    f"space.{twice[0]}: points have values of it, too; give each field in one of the two"
                )
        elif trials is None or not space:
            raise ValueError(
                f"search={search}: draws points from a space; "
                "give trials=NUMBER and space={field: [values]}"
            )
        return self

    @model_validator(mode="after")
    def _check_metrics(self) -> Self:
        reported = self._reported_metrics()
        if unknown := [name for name in self.metrics if name not in reported]:
            raise ValueError(
                f"metrics={unknown[0]}: is not reported by these trials; choose from {', '.join(reported)}"
            )
        return self

    def _reported_metrics(self) -> list[str]:
        """The metrics that every trial reports and can be compared by."""
        if self.train.data.validation_path is None:
            return ["loss"]
        counts = self._validated_counts()
        tax_counts = counts[1:] if counts[:1] == [1] else []
        return [
            "loss",
            *(f"validation/loss_{count}" for count in counts),
            *(f"validation/branch_tax_{count}" for count in tax_counts),
        ]

    def _validated_counts(self) -> list[int]:
        """The branch counts that every trial is validated at. Without the patch, that is one branch."""
        counts = sorted(set(self.train.metrics.validation_branches))
        patched = self.search_space.values_of("patch_rope", self.train.rope.patch_rope)
        if all(patched):
            return counts
        return [1] if not any(patched) or 1 in counts else []

    def trial_config(self, number: int, settings: dict[str, Any], output_dir: str) -> TrainConfig:
        """The configuration of a trial's run. Raises UserError if training rejects the settings."""
        values = {
            **self.train.model_dump(mode="json"),
            **settings,
            "name": f"{self.name}-{number:03}",
            "output_dir": output_dir,
            "push_to": None,  # the winner alone is uploaded
        }
        return resolve(TrainConfig, values, source=f"trial {number}")
