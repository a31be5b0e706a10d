"""Groups of settings. Every function takes the group that it needs; commands compose them."""

from __future__ import annotations

from itertools import permutations
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from parallelmind.config.frozen import FrozenConfig
from parallelmind.config.paths import AdapterPath, HubRepo, TrackingUri
from parallelmind.errors import format_value

Dtype = Literal["float32", "bfloat16", "float16"]
DtypeOrAuto = Literal[Dtype, "auto"]
BoolOrAuto = Literal[True, False, "auto"]
Quantize = Literal["none", "8bit", "4bit"]
Pairs = Literal["high", "mid", "low", "spread"]
BranchAngle = Literal["alone", "added"]
Positions = Literal["flat", "time"]
Visibility = Literal["columnar", "isolated"]
Alignment = Literal["left", "right"]
SiblingPenalty = Annotated[float, Field(ge=0)] | Literal["learned"]


class ModelConfig(FrozenConfig):
    """Base model."""

    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset({"add_tokens"})

    base_model: str = Field(
        "smollm2-135m", min_length=1, description="smollm2-135m, a local folder, or a hub id"
    )
    dtype: DtypeOrAuto = Field(
        "auto",
        description="compute dtype; auto: bfloat16 on a GPU that computes it in hardware, else float32; "
        "trained weights stay float32",
    )
    quantize: Quantize = Field(
        "none", description="load the base weights quantized to 8 or 4 bits (bitsandbytes)"
    )
    trust_remote_code: bool = Field(False, description="allow a hub model to run its own code")
    add_tokens: list[str] = Field(
        [],
        description="new tokens of the tokenizer; their embeddings are trained with the adapter",
    )

    @model_validator(mode="after")
    def _check_add_tokens(self) -> Self:
        if self.add_tokens and self.quantize != "none":
            raise ValueError(
                f"add_tokens={format_value(self.add_tokens)}: not supported with quantize={self.quantize}; "
                "set quantize=none"
            )
        return self


class RopeConfig(FrozenConfig):
    """Branches: 2D RoPE, positions and visibility."""

    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset({"branch_embeddings"})

    patch_rope: bool = Field(
        True, description="patch the model with 2D RoPE; false trains plain sequences of one branch"
    )
    rope_2d_ratio: float = Field(
        0.5, ge=0, le=1, description="share of the rotary frequency pairs that (branch, time) drives"
    )
    pairs: Pairs = Field(
        "high", description="pairs that the ratio selects: highest, middle or lowest (published) frequencies"
    )
    branch_angle: BranchAngle = Field(
        "added",
        description="angle of a selected pair: branch or time alone (published), or branch + time added",
    )
    branch_stride: int = Field(
        16, ge=1, description="distance between the branch coordinates of neighbouring branches"
    )
    positions: Positions = Field(
        "time", description="coordinate of the remaining pairs: time, or the flat token index (published)"
    )
    visibility: Visibility = Field(
        "columnar",
        description="columnar (published): branches attend to each other's past; isolated: they do not",
    )
    sibling_penalty: SiblingPenalty = Field(
        3.0,
        description="columnar: subtracted from attention scores of sibling branches, in nats; learned: a "
        "number for each layer and head, trained with the adapter; published: 0",
    )
    branch_embeddings: int = Field(
        0,
        ge=0,
        description="columnar: number of embeddings, trained with the adapter, which are added to those of a "
        "branch's tokens by the number of the branch; 0: none",
    )
    align_to: Alignment = Field(
        "left", description="left: branches start together after main; right: they end together"
    )

    @model_validator(mode="after")
    def _check_branch_embeddings(self) -> Self:
        if self.branch_embeddings and (self.visibility == "isolated" or not self.patch_rope):
            needed = "visibility=columnar" if self.patch_rope else "patch_rope=true"
            raise ValueError(
                f"branch_embeddings={self.branch_embeddings}: needs {needed}; set it, or branch_embeddings=0"
            )
        return self


class LoraConfig(FrozenConfig):
    """LoRA adapter."""

    lora_rank: int = Field(16, ge=1, description="rank of the LoRA update")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale; the update is multiplied by alpha / rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the LoRA input during training")
    lora_targets: str = Field(
        "all-linear",
        min_length=1,
        description="names of the modules to adapt, comma-separated, or all-linear",
    )
    lora_init: Literal["zero", "pissa"] = Field(
        "zero",
        description="zero: start as the base model; pissa: start from its principal singular directions",
    )
    use_rslora: bool = Field(False, description="rsLoRA: scale by alpha / sqrt(rank)")
    use_dora: bool = Field(False, description="DoRA: also train the norm of every adapted weight")


class DataConfig(FrozenConfig):
    """Data, samples and batches."""

    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset({"truncate_side", "packing", "fork_markers"})

    data_path: str = Field(
        min_length=1,
        description="parallel JSONL (or .gz, .zst), Parquet, Arrow: file, folder, glob, URL, or a comma list",
    )
    validation_path: str | None = Field(
        None, description="held-out data in the same formats; null: no validation"
    )
    branches_per_sample: int | None = Field(
        None, ge=1, description="standalone records grouped into one sample; null: a random number"
    )
    min_branches_per_sample: int = Field(1, ge=1, description="minimum branches of a randomly grouped sample")
    max_branches_per_sample: int = Field(
        8, ge=1, description="maximum branches of a sample, nested ones included, documents not"
    )
    overfull: Literal["split", "refuse"] = Field(
        "split",
        description="record with more branches: split into samples that repeat main and parents, where a "
        "reduce stays with all that it reads, or refuse it as bad",
    )
    batch_size: int = Field(4, ge=1, description="samples (or branches) per forward pass and worker")
    batch_by_samples: bool = Field(
        True, description="true: batch_size counts samples; false: it counts branches"
    )
    batch_tokens: int | None = Field(
        None, ge=4, description="replaces batch_size: maximum tokens of a batch, padding included"
    )
    packing: bool = Field(
        False, description="lay the samples of a batch side by side in one row, without padding"
    )
    length_window: int = Field(
        32, ge=1, description="batches whose samples are sorted by length together; 1: no sorting"
    )
    random_time_offset: int = Field(
        0, ge=0, description="maximum random delay of each branch's start, in time steps"
    )
    max_branch_tokens: int = Field(
        512, ge=2, description="maximum length of a main, branch or reduce, in tokens"
    )
    max_sample_tokens: int = Field(
        4096,
        ge=4,
        description="maximum length of a sample, in tokens; a branch or reduce that exceeds it together with "
        "all that it reads is skipped",
    )
    overlong: Literal["truncate", "skip", "keep_answer"] = Field(
        "truncate",
        description="text beyond max_branch_tokens: truncate; skip, with all that reads it; "
        "or keep_answer: cut the start of its prompt, skip it if its targets do not fit, and truncate it if "
        "it has none",
    )
    truncate_side: Literal["right", "left"] = Field(
        "right", description="end of a text that truncate cuts off; left keeps the begin token"
    )
    fork_markers: list[str] = Field(
        [],
        description="four texts with which the model learns to fork by itself: before, between and after "
        "the titles of the branches, and at the start of the reduce; []: only requests fork",
    )
    strict: bool = Field(False, description="stop at the first bad record instead of skipping it")
    max_bad_records: float | None = Field(
        None, ge=0, description="bad records to tolerate: a count, or a share below 1; null: no limit"
    )
    shuffle_window: int = Field(
        1024, ge=1, description="samples in the seeded shuffle buffer; 1: the order of the files"
    )

    @model_validator(mode="after")
    def _check_branch_range(self) -> Self:
        for name in ("min_branches_per_sample", "branches_per_sample"):
            value = getattr(self, name)
            if value is not None and value > self.max_branches_per_sample:
                raise ValueError(
                    f"{name}={value}: exceeds max_branches_per_sample={self.max_branches_per_sample}; "
                    "lower the former or raise the latter"
                )
        return self

    @model_validator(mode="after")
    def _check_fork_markers(self) -> Self:
        markers = self.fork_markers
        if (markers and len(markers) != 4) or not all(marker.strip() for marker in markers):
            problem = "give four texts with a visible character, or []"
        elif any(one in other for one, other in permutations(markers, 2)):
            problem = "one of them is in another; give four texts of which none holds another"
        else:
            return self
        raise ValueError(f"fork_markers={format_value(markers)}: {problem}")


class OptimizerConfig(FrozenConfig):
    """Training and optimizer."""

    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset({"compile", "global_batch_size"})

    tuning: Literal["lora", "full"] = Field(
        "lora", description="lora: train an adapter; full: train every parameter of the model"
    )
    resume_adapter: AdapterPath | None = Field(
        None, description="adapter folder to start from, with a fresh optimizer; null: a new adapter"
    )
    epochs: int = Field(1, ge=1, description="passes over the data")
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps; null: after all epochs"
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="decay of the learning rate after warmup"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps used for linear warmup")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    gradient_clip: float = Field(1.0, gt=0, description="maximum gradient norm of a step")
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="samples per optimizer step, of all workers and accumulated batches (branches with "
        "batch_by_samples=false, tokens with batch_tokens); null: batch_size (or batch_tokens) x "
        "accumulation_steps x num_workers",
    )
    accumulation_steps: int | None = Field(
        None,
        ge=1,
        description="batches per worker and optimizer step; null: 1, or what global_batch_size needs",
    )
    max_bad_steps: int = Field(
        10, ge=1, description="fail after this many consecutive steps without a finite gradient"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    compile: bool = Field(
        False,
        description="compile the decoder layers (torch.compile) and pad batches to few shapes: a slow start, "
        "then faster steps",
    )
    seed: int = Field(0, ge=0, description="seed of grouping, shuffling, initialisation and dropout")


class RunConfig(FrozenConfig):
    """Run name and folder."""

    name: str = Field(
        "train", pattern=r"^[A-Za-z0-9._-]+$", description="name of the run; its folder is name-confighash"
    )
    output_dir: str = Field("runs", min_length=1, description="folder that holds the runs")


class WorkersConfig(FrozenConfig):
    """Ray Train workers."""

    num_workers: int = Field(1, ge=1, description="Ray Train workers")
    min_workers: int | None = Field(
        None, ge=1, description="continue with this many when workers are lost; null: wait for all"
    )
    sharding: Literal["none", "full"] = Field(
        "none", description="full: shard the model over the workers (FSDP2)"
    )
    use_gpu: BoolOrAuto = Field(
        "auto", description="give every worker one GPU; auto: if there are as many GPUs"
    )


class CheckpointConfig(FrozenConfig):
    """Checkpoints."""

    checkpoint_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(
        2, ge=1, description="newest checkpoints to keep, in addition to the best one"
    )


class MetricsConfig(FrozenConfig):
    """Metrics and validation."""

    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset({"page_samples"})

    log_every: int = Field(5, ge=1, description="optimizer steps between progress lines and logged metrics")
    validate_every: int = Field(100, ge=1, description="optimizer steps between validations")
    validation_branches: list[int] = Field(
        [1, 4, 8], min_length=1, description="branch counts to measure the validation loss at"
    )
    validation_samples: int = Field(
        32, ge=1, description="held-out branches to validate on, the same at every branch count"
    )
    page_samples: int = Field(
        3,
        ge=0,
        description="held-out records whose prompts are saved with the result, as samples on the page of a "
        "server; 0: none",
    )

    @model_validator(mode="after")
    def _check_branch_counts(self) -> Self:
        if wrong := [count for count in self.validation_branches if count < 1]:
            raise ValueError(
                f"validation_branches={wrong[0]}: a sample has at least one branch; give counts of 1 or more"
            )
        return self


class ServicesConfig(FrozenConfig):
    """Tracking and Ray."""

    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset({"track"})

    track: Literal["mlflow", "wandb"] = Field(
        "mlflow", description="wandb: track the run in Weights & Biases, too"
    )
    mlflow_uri: TrackingUri = Field("sqlite:///mlflow.db", min_length=1, description="MLflow tracking URI")
    mlflow_experiment: str = Field("parallelmind", min_length=1, description="MLflow experiment")
    ray_address: str | None = Field(
        None, description="Ray cluster to join; null: $RAY_ADDRESS, or a local one"
    )


class HubConfig(FrozenConfig):
    """Upload to the Hugging Face hub."""

    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset({"push_to", "push_private"})

    push_to: HubRepo | None = Field(
        None, description="repository that gets the result of the run: USER/NAME; null: no upload"
    )
    push_private: bool = Field(False, description="create the repository as a private one")
