"""Every setting of a run: frozen, strict, one line of meaning each; `key=value` in, one hash out.

A run's configuration is one flat namespace (the published field names), assembled from small parts so that
each function asks for the part that it needs and no more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from yaml import YAMLError

from parallelmind.errors import UserError, first_line, format_value

Dtype = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["none", "8bit", "4bit"]
Pairs = Literal["high", "mid", "low", "spread"]
BranchAngle = Literal["alone", "added"]
Positions = Literal["flat", "time"]
Visibility = Literal["columnar", "isolated"]
Alignment = Literal["left", "right"]

PartT = TypeVar("PartT", bound="FrozenConfig")


class FrozenConfig(BaseModel):
    """A frozen, strict group of fields; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    def part(self, kind: type[PartT]) -> PartT:
        """The fields of `kind` alone, for a configuration that includes them."""
        return kind(**{name: getattr(self, name) for name in kind.model_fields})

    @field_validator("output_path", "png_path", check_fields=False)  # of those that have them
    @classmethod
    def _on_this_machine(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is not None and "://" in path:
            raise ValueError(
                f"{info.field_name}={path}: a URI, and files are written here; give a path, and copy it there"
            )
        return path

    WHERE: ClassVar[frozenset[str]] = frozenset()  # fields that say where something happens, not what

    def fingerprint(self) -> str:
        """First 12 hex digits of the SHA-256 over all fields but `WHERE`: the same settings give the same
        text anywhere.
        """
        canonical = json.dumps(
            self.model_dump(mode="json", exclude=set(self.WHERE)), sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


class RopeConfig(FrozenConfig):
    """How tokens of parallel branches are placed and what they may see."""

    patch_rope: bool = Field(
        True, description="patch the model with 2D RoPE; false trains plain sequences of one branch"
    )
    rope_2d_ratio: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of rotary pairs driven by (branch, time); alone, the branch gets about half of it",
    )
    pairs: Pairs = Field(
        "high", description="which pairs the ratio selects: highest, middle or lowest (published) frequencies"
    )
    branch_angle: BranchAngle = Field(
        "added",
        description="alone (published): a branch pair follows the branch; added: branch + time, on all selected pairs",
    )
    branch_stride: int = Field(
        16, ge=1, description="distance between the branch coordinates of neighbouring branches"
    )
    positions: Positions = Field(
        "time", description="what drives the other pairs: the time, or the flat index (published)"
    )
    visibility: Visibility = Field(
        "columnar", description="columnar (published): branches see each other's past; isolated: not"
    )
    sibling_penalty: float = Field(
        3.0,
        ge=0,
        description="columnar: taken off the attention scores of other branches, in nats; 0: nothing (published)",
    )
    align_to: Alignment = Field(
        "left", description="left: branches start together after main; right: they end together"
    )


class LoraConfig(FrozenConfig):
    """The low-rank adapter that peft trains."""

    lora_rank: int = Field(16, ge=1, description="rank of the LoRA update")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale; the update is multiplied by alpha / rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the LoRA input while training")
    lora_targets: str = Field(
        "all-linear", min_length=1, description="module names to adapt, comma-separated, or all-linear"
    )
    lora_init: Literal["zero", "pissa"] = Field(
        "zero", description="zero: starts as the base; pissa: its principal directions"
    )
    use_rslora: bool = Field(False, description="divide alpha by the root of the rank instead of the rank")
    use_dora: bool = Field(False, description="train the norm of every adapted weight as well (DoRA)")


class ModelConfig(FrozenConfig):
    """The pretrained model underneath."""

    base_model: str = Field(
        "smollm2-135m", min_length=1, description="smollm2-135m, a local folder, or a hub id"
    )
    dtype: Dtype = Field("float32", description="type to compute in; trained weights stay float32")
    quantize: Quantize = Field("none", description="keep the base weights in fewer bits (bitsandbytes)")
    trust_remote_code: bool = Field(False, description="allow a hub model to run its own code")


class DataConfig(FrozenConfig):
    """Where the text comes from and how it becomes samples and batches."""

    data_path: str = Field(
        min_length=1,
        description="parallel JSONL (plain, .gz, .zst) or Parquet: file, folder, glob, URL, or several with commas",
    )
    validation_path: str | None = Field(
        None, description="held-out text, in the same forms; null: no validation"
    )
    branches_per_sample: int | None = Field(
        None, ge=1, description="lone records to group into one sample; null: drawn anew"
    )
    min_branches_per_sample: int = Field(1, ge=1, description="fewest branches of a randomly grouped sample")
    max_branches_per_sample: int = Field(8, ge=1, description="most branches of a sample")
    overfull: Literal["split", "refuse"] = Field(
        "split", description="a record with more: split, with main in each part, or bad"
    )
    batch_size: int = Field(4, ge=1, description="samples (or branches) per forward pass of one worker")
    batch_by_samples: bool = Field(True, description="batch_size counts samples; false counts branches")
    batch_tokens: int | None = Field(
        None, ge=4, description="in place of batch_size: most tokens of a batch, padding included"
    )
    length_window: int = Field(
        32, ge=1, description="batches whose samples are sorted by length together; 1 keeps their order"
    )
    random_time_offset: int = Field(
        0, ge=0, description="start each branch up to this many time steps late, drawn anew"
    )
    max_branch_tokens: int = Field(512, ge=2, description="longest main or branch, in tokens")
    max_sample_tokens: int = Field(
        4096, ge=4, description="longest sample, in tokens; branches over it are skipped"
    )
    overlong: Literal["truncate", "skip"] = Field(
        "truncate", description="what happens to a main or branch over the limit"
    )
    strict: bool = Field(False, description="stop at the first bad record instead of counting it")
    max_bad_records: float | None = Field(
        None, ge=0, description="most bad records to go on with: a count, or a share below 1"
    )
    shuffle_window: int = Field(
        1024, ge=1, description="samples held in the seeded shuffle buffer; 1 keeps the file's order"
    )

    @model_validator(mode="after")
    def _branch_range(self) -> Self:
        if self.min_branches_per_sample > self.max_branches_per_sample:
            raise ValueError(
                f"min_branches_per_sample={self.min_branches_per_sample}: exceeds "
                f"max_branches_per_sample={self.max_branches_per_sample}; lower the one or raise the other"
            )
        if self.branches_per_sample is not None and self.branches_per_sample > self.max_branches_per_sample:
            raise ValueError(
                f"branches_per_sample={self.branches_per_sample}: exceeds "
                f"max_branches_per_sample={self.max_branches_per_sample}; lower the one or raise the other"
            )
        return self


class OptimizerConfig(FrozenConfig):
    """How the model learns."""

    tuning: Literal["lora", "full"] = Field(
        "lora", description="train an adapter, or every parameter of the model"
    )
    resume_adapter: str | None = Field(
        None, description="adapter folder to go on from, with a fresh optimizer; null: a new one"
    )
    epochs: int = Field(1, ge=1, description="passes over the data")
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps; null: after all epochs"
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the rate falls after the warm-up"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm of a step")
    accumulation_steps: int = Field(1, ge=1, description="batches per worker and optimizer step")
    max_bad_steps: int = Field(
        10, ge=1, description="give up after this many steps in a row without a finite gradient"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    seed: int = Field(0, ge=0, description="seed of grouping, shuffling, initialisation and dropout")


class RunConfig(FrozenConfig):
    """Where a run happens and what it leaves behind."""

    name: str = Field(
        "train", pattern=r"^[A-Za-z0-9._-]+$", description="name of the run; its folder is name-confighash"
    )
    output_dir: str = Field("runs", min_length=1, description="folder that holds the runs")
    num_workers: int = Field(1, ge=1, description="Ray Train workers")
    min_workers: int | None = Field(
        None, ge=1, description="go on with as few when others are lost; null: wait for all"
    )
    sharding: Literal["none", "full"] = Field(
        "none", description="full: split the model over the workers (FSDP2)"
    )
    use_gpu: bool = Field(False, description="give every worker one GPU")
    checkpoint_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept on disk, beside the best one")
    log_every: int = Field(5, ge=1, description="optimizer steps between progress lines and metrics")
    validate_every: int = Field(100, ge=1, description="optimizer steps between validations")
    validation_branches: list[int] = Field(
        [1, 4, 8], min_length=1, description="branch counts to measure validation loss at"
    )
    validation_samples: int = Field(
        32, ge=1, description="held-out branches to measure on, the same at every branch count"
    )
    mlflow_uri: str = Field("sqlite:///mlflow.db", min_length=1, description="MLflow tracking URI")
    mlflow_experiment: str = Field("parallelmind", min_length=1, description="MLflow experiment")
    ray_address: str | None = Field(
        None, description="Ray cluster to join; null: $RAY_ADDRESS, or a local one"
    )


class TrainConfig(RunConfig, OptimizerConfig, DataConfig, LoraConfig, RopeConfig, ModelConfig):
    """A whole training run. It may be gone on with on other workers than it was begun on, and told of
    otherwise.
    """

    WHERE: ClassVar[frozenset[str]] = frozenset(
        "num_workers min_workers sharding use_gpu ray_address output_dir mlflow_uri mlflow_experiment "
        "log_every checkpoint_every keep_checkpoints".split()
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.patch_rope and (self.branches_per_sample or self.max_branches_per_sample) != 1:
            raise ValueError(
                "patch_rope=false: reads one branch per sample; set branches_per_sample=1 max_branches_per_sample=1"
            )
        if wrong := [count for count in self.validation_branches if count < 1]:
            raise ValueError(
                f"validation_branches={wrong[0]}: a sample has one branch at least; give counts of 1 or more"
            )
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers}: exceeds num_workers={self.num_workers}; lower the one or raise the other"
            )
        if self.quantize != "none" and (self.tuning == "full" or self.sharding == "full"):
            field = "tuning" if self.tuning == "full" else "sharding"
            raise ValueError(
                f"quantize={self.quantize}: weights in few bits can be neither trained nor split; drop it or {field}=full"
            )
        if self.quantize != "none" and self.lora_init == "pissa":
            raise ValueError(
                f"lora_init=pissa: cannot split weights in few bits; set lora_init=zero or drop quantize={self.quantize}"
            )
        if self.quantize == "8bit" and self.use_dora:
            raise ValueError(
                "use_dora=true: loses the scales of 8-bit weights; set quantize=4bit or quantize=none"
            )
        if self.tuning == "full" and self.resume_adapter:
            raise ValueError(
                "tuning=full: trains no adapter; give the folder to go on from as base_model, not as resume_adapter"
            )
        return self


def resolve(
    kind: type[PartT], values: dict[str, Any], dotlist: Sequence[str] = (), source: str = "config"
) -> PartT:
    """`values` overridden by `key=value` items, validated as `kind`. Raises UserError with one line per
    problem.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(dotlist)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        given = " ".join(dotlist)
        raise UserError(
            f"{source}: cannot read the overrides {given} ({first_line(error)}); write key=value"
        ) from error
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise UserError("; ".join(_explain(kind, item) for item in error.errors())) from error


def _explain(kind: type[FrozenConfig], problem: Any) -> str:
    """One pydantic error as one line: field, value, remedy."""
    field = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field{did_you_mean(field, kind)}; --help lists them all"
    if problem["type"] == "missing":
        return f"{field}: required and not given; add {field}=…"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    remedy = problem["msg"].removeprefix("Input ").removeprefix("String ")
    return f"{field}={format_value(problem['input'])}: {remedy}"


def did_you_mean(field: str, kind: type[FrozenConfig]) -> str:
    """A field of `kind` that is spelt almost so, as a parenthesis; nothing where there is none."""
    import difflib

    near = difflib.get_close_matches(field, kind.model_fields, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
