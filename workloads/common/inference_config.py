"""Config fields that every command which decodes or evaluates shares: the model to load and how to sample."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field

import parallelmind as pm
from parallelmind import hardware
from parallelmind.config import (
    AdapterPath,
    Alignment,
    BoolOrAuto,
    BranchAngle,
    DtypeOrAuto,
    FrozenConfig,
    Pairs,
    Positions,
    Quantize,
    SiblingPenalty,
    Visibility,
)
from workloads.common.devices import Gpus


class InferenceModelConfig(FrozenConfig):
    """Model. A null field takes the adapter's value, or the training default without an adapter."""

    base_model: str | None = Field(
        None, description="smollm2-135m, a local folder, or a hub id; null: the adapter's own"
    )
    lora_path: AdapterPath | None = Field(
        None, description="adapter folder, run folder or runs/NAME-*, the newest; null: the base model alone"
    )
    use_gpu: BoolOrAuto = Field("auto", description="compute on the GPU; auto: if there is one")
    dtype: DtypeOrAuto = Field(
        "auto",
        description="compute dtype; auto: bfloat16 on a GPU that computes it in hardware, else float32",
    )
    quantize: Quantize | None = Field(None, description="keep the base weights in fewer bits (bitsandbytes)")
    trust_remote_code: bool = Field(False, description="allow a hub model to run its own code")
    patch_rope: bool | None = Field(None, description="false: leave the model as it is, without 2D RoPE")
    rope_2d_ratio: float | None = Field(
        None, ge=0, le=1, description="share of rotary pairs driven by (branch, time)"
    )
    pairs: Pairs | None = Field(None, description="which pairs the ratio selects")
    branch_angle: BranchAngle | None = Field(
        None, description="whether branch pairs follow the branch alone, or branch + time"
    )
    branch_stride: int | None = Field(
        None, ge=1, description="distance between neighbouring branch coordinates"
    )
    positions: Positions | None = Field(None, description="what drives the other pairs")
    sibling_penalty: SiblingPenalty | None = Field(
        None, description="columnar: subtracted from the attention scores of other branches"
    )
    branch_embeddings: int | None = Field(None, ge=0, description="number of learned embeddings of branches")
    visibility: Visibility | None = Field(None, description="what branches see of each other")
    align_to: Alignment | None = Field(None, description="whether prompts start or end together")

    def decided(self, gpus: Gpus, processes: int = 1) -> Self:
        """The same without `auto`. Raises UserError as `Gpus.decide` does."""
        use_gpu, dtype = gpus.decide(self.use_gpu, self.dtype, processes)
        return self.model_copy(update={"use_gpu": use_gpu, "dtype": dtype})

    def load_kwargs(self) -> dict[str, Any]:
        """Arguments for `parallelmind.load_model_with_lora`: the fields that are not null."""
        return self.model_dump(exclude_none=True, exclude={"use_gpu"})

    def paths(self) -> dict[str, list[str | None]]:
        """The model's inputs by field, which no output may replace."""
        return {"base_model": [self.base_model], "lora_path": [self.lora_path]}

    def check(self) -> None:
        """Raise UserError for a model that cannot be loaded, before a library is imported that loads it."""
        from parallelmind.model.preflight import check_model

        settings = self.model_dump(exclude={"base_model", "lora_path"}, exclude_none=True)
        check_model(self.base_model, self.lora_path, self.quantize, settings)

    def load(self, **options: Any) -> tuple[Any, Any]:
        """Load model and tokenizer, on the GPU if `use_gpu` says so. Without a GPU, compute with all CPUs.

        options: more arguments of `load_model_with_lora`. Raises UserError if the model cannot be loaded or a
        field contradicts the adapter.
        """
        from parallelmind.model.structure import to_gpu

        config = self.decided(Gpus.of_this_machine())
        hardware.use_available_cpus()
        model, tokenizer = pm.load_model_with_lora(**config.load_kwargs(), **options)
        return to_gpu(model) if config.use_gpu else model, tokenizer


class SamplingConfig(FrozenConfig):
    """Sampling. `parallelmind.SamplingParams` defines the valid ranges."""

    max_new_tokens: int = Field(64, description="maximum number of new tokens per branch")
    temperature: float = Field(0.0, description="0: take the most likely token; above 0: draw at random")
    top_k: int = Field(0, description="draw from the k most likely tokens; 0: all")
    top_p: float = Field(
        1.0, description="draw from the smallest set of tokens with this total probability; 1: all"
    )
    min_p: float = Field(
        0.0, description="draw from tokens whose probability is at least this share of the highest; 0: all"
    )
    repetition_penalty: float = Field(1.0, description="above 1 makes repetition less likely")
    stop: list[str] = Field([], description="strings that end a branch; they are not part of the output")
    seed: int | None = Field(None, description="the same seed gives the same draws; null: random draws")
    ignore_eos: bool = Field(False, description="continue after the end-of-text token")

    def to_kwargs(self) -> dict[str, Any]:
        """Arguments for `parallelmind.generate`. Raises UserError if a value is out of range."""
        values = self.model_dump()
        pm.SamplingParams(**values)
        return values
