"""Config of `python -m workloads.generate`."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from parallelmind.config import FrozenConfig, GroupedConfig, OutputPath
from parallelmind.errors import format_value
from workloads.common.inference_config import InferenceModelConfig, SamplingConfig


class InputConfig(FrozenConfig):
    """Input. Exactly one of `prompt`, `prompts` and `data_path` is given."""

    prompt: str | None = Field(None, description="one prompt to continue")
    prompts: list[str] = Field([], description="prompts to continue in parallel, as branches of one sample")
    main: str = Field("", description="text that all prompts share")
    data_path: str | None = Field(
        None,
        description=(
            "parallel JSONL, Parquet, Arrow or .txt (one prompt per line): "
            "file, folder, glob, URL, or several separated by commas"
        ),
    )
    reduce: str | None = Field(
        None,
        min_length=1,
        description="prompt of a last branch, which reads main and all others; a line's own comes first",
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        sources = [name for name in ("prompt", "prompts", "data_path") if getattr(self, name)]
        if len(sources) != 1:
            raise ValueError(
                f"{' and '.join(sources) or 'prompt'}: "
                "give exactly one of prompt=…, prompts=[…,…] and data_path=…"
            )
        if self.main and self.data_path:
            raise ValueError(
                f"main={format_value(self.main)}: each line of data_path has its own main; "
                "write main into the lines"
            )
        return self


class GenerateRunConfig(FrozenConfig):
    """Output and workers."""

    output_path: OutputPath | None = Field(
        None, description="JSONL file for the results, a folder with num_workers; null: stdout"
    )
    num_workers: int = Field(
        0, ge=0, description="Ray workers that share data_path, one engine each; 0: run in this process"
    )
    ray_address: str | None = Field(
        None, description="Ray cluster to join; null: $RAY_ADDRESS, or a local one"
    )


class GenerateConfig(GroupedConfig):
    """Run of `python -m workloads.generate`."""

    input: InputConfig
    run: GenerateRunConfig
    sampling: SamplingConfig
    model: InferenceModelConfig

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.run.num_workers and not (self.input.data_path and self.run.output_path):
            raise ValueError(
                f"num_workers={self.run.num_workers}: workers read data_path and write files; "
                "give data_path and output_path"
            )
        return self
