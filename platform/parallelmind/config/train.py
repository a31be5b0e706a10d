"""Configuration of one training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import model_validator

from parallelmind.config.frozen import GroupedConfig, short_hash
from parallelmind.config.groups import (
    CheckpointConfig,
    DataConfig,
    HubConfig,
    LoraConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    RunConfig,
    ServicesConfig,
    WorkersConfig,
)


class TrainConfig(GroupedConfig):
    """Training run. It may resume with other logging settings, and with another worker count.

    The fingerprint covers the samples of an optimizer step (`global_batch_size`, resolved), so neither how
    many workers share them nor the name of the run is a part of it. The order of groups and fields is the
    order in config.yaml.
    """

    NON_IDENTITY_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {
            "name",
            "accumulation_steps",
            "num_workers",
            "min_workers",
            "sharding",
            "use_gpu",
            "ray_address",
            "output_dir",
            "track",
            "mlflow_uri",
            "mlflow_experiment",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "page_samples",
            "push_to",
            "push_private",
        }
    )

    model: ModelConfig
    rope: RopeConfig
    lora: LoraConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig
    workers: WorkersConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    services: ServicesConfig
    hub: HubConfig

    if TYPE_CHECKING:  # flat field names, which the type checker cannot know

        def __init__(self, **fields: Any) -> None: ...

    @property
    def batches_per_step(self) -> int:
        """Batches of one optimizer step, of all workers together."""
        size = self.optimizer.global_batch_size
        if size is not None:
            return size // self._batch_size
        return (self.optimizer.accumulation_steps or 1) * self.workers.num_workers

    @property
    def _batch_size(self) -> int:
        """Size of one batch in the unit of `global_batch_size`."""
        return self.data.batch_tokens or self.data.batch_size

    def with_global_batch_size(self) -> Self:
        """The same run with `global_batch_size` as a number, which keeps its identity on other workers."""
        size = self.batches_per_step * self._batch_size
        return self.replace(global_batch_size=size, accumulation_steps=None)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "global_batch_size": self.batches_per_step * self._batch_size}

    def earlier_fingerprint(self) -> str:
        """The fingerprint that versions without `global_batch_size` gave the run.

        It covers `name` and `accumulation_steps`.
        """
        not_covered = self.NON_IDENTITY_FIELDS - {"name", "accumulation_steps"}
        values = self.dump_without_later_defaults()
        return short_hash({name: value for name, value in values.items() if name not in not_covered})

    @model_validator(mode="after")
    def _check_global_batch_size(self) -> Self:
        size, accumulated = self.optimizer.global_batch_size, self.optimizer.accumulation_steps
        if size is None:
            return self
        workers = self.workers.num_workers
        one_batch = "batch_tokens" if self.data.batch_tokens else "batch_size"
        unit = self._batch_size * workers
        factors = f"{one_batch}={self._batch_size} x num_workers={workers}"
        if size % unit:
            raise ValueError(
                f"global_batch_size={size}: is no multiple of {factors}; set a multiple of {unit}, or change "
                f"{one_batch} or num_workers"
            )
        if accumulated is not None and accumulated * unit != size:
            raise ValueError(
                f"accumulation_steps={accumulated}: global_batch_size={size} with {factors} makes it "
                f"{size // unit}; drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_branches(self) -> Self:
        data = self.data
        if data.packing and not self.rope.patch_rope:
            raise ValueError("packing=true: needs the masks of patch_rope=true; drop one of the two")
        if not self.rope.patch_rope and {data.branches_per_sample or 1, data.max_branches_per_sample} != {1}:
            raise ValueError(
                "patch_rope=false: trains one branch per sample; "
                "set branches_per_sample=1 max_branches_per_sample=1"
            )
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        workers = self.workers
        if workers.min_workers is not None and workers.min_workers > workers.num_workers:
            raise ValueError(
                f"min_workers={workers.min_workers}: exceeds num_workers={workers.num_workers}; "
                "lower the former or raise the latter"
            )
        return self

    @model_validator(mode="after")
    def _check_quantization(self) -> Self:
        quantize = self.model.quantize
        if quantize == "none":
            return self
        for field, value in (("tuning", self.optimizer.tuning), ("sharding", self.workers.sharding)):
            if value == "full":
                raise ValueError(
                    f"quantize={quantize}: quantized weights can be neither trained nor sharded; "
                    f"drop it or {field}=full"
                )
        if self.lora.lora_init == "pissa":
            raise ValueError(
                "lora_init=pissa: cannot decompose quantized weights; set lora_init=zero or drop "
                f"quantize={quantize}"
            )
        if quantize == "8bit" and self.lora.use_dora:
            raise ValueError(
                "use_dora=true: loses the scales of 8-bit weights; set quantize=4bit or quantize=none"
            )
        return self

    @model_validator(mode="after")
    def _check_add_tokens(self) -> Self:
        if self.model.add_tokens and self.workers.sharding == "full" and self.optimizer.tuning == "lora":
            raise ValueError(
                "sharding=full: cannot train single rows of an embedding; drop it, drop add_tokens, or set "
                "tuning=full"
            )
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        if self.optimizer.compile and self.workers.sharding == "full":
            raise ValueError("compile=true: cannot compile sharded layers; drop it or sharding=full")
        return self

    @model_validator(mode="after")
    def _check_penalty(self) -> Self:
        if self.rope.sibling_penalty != "learned":
            return self
        if self.optimizer.tuning == "full":
            raise ValueError(
                "sibling_penalty=learned: is kept in an adapter, which tuning=full does not train; "
                "set a number, or drop tuning=full"
            )
        if self.workers.sharding == "full":
            raise ValueError(
                "sibling_penalty=learned: sharded workers need a gradient for every weight, and a batch "
                "without siblings gives penalties none; set a number, or drop sharding=full"
            )
        return self

    @model_validator(mode="after")
    def _check_branch_embeddings(self) -> Self:
        if not (count := self.rope.branch_embeddings):
            return self
        for field, value, reason in (
            ("tuning", self.optimizer.tuning, "are kept in an adapter, which tuning=full does not train"),
            ("sharding", self.workers.sharding, "are not sharded"),
        ):
            if value == "full":
                raise ValueError(f"branch_embeddings={count}: {reason}; set 0, or drop {field}=full")
        if self.model.add_tokens:
            raise ValueError(f"branch_embeddings={count}: not supported with add_tokens; drop one of them")
        return self

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        if self.optimizer.tuning == "full" and self.optimizer.resume_adapter:
            raise ValueError(
                "tuning=full: trains no adapter; give the folder to continue from as base_model, not as "
                "resume_adapter"
            )
        return self
