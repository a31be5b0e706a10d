"""Continue prompts with a base model and, where one is given, its adapter.

    python -m workloads.generate prompt="Once upon a time"
    python -m workloads.generate main="A passage." prompts="[Who is it?, Where is it?]" max_new_tokens=32
    python -m workloads.generate lora_path=runs/demo-HASH/adapter data_path=samples.jsonl output_path=out.jsonl
    python -m workloads.generate lora_path=runs/demo-HASH/adapter data_path="in/*.jsonl.gz" output_path=out num_workers=2

`prompts` are branches of one sample that share `main`. `data_path` is parallel JSONL or Parquet (every line a
sample, continued after its prompts), or .txt (every line a prompt of its own), each also .gz or .zst. Many
samples are decoded side by side.

A single prompt is answered on stdout in plain text. All else gives JSONL, {"line", "main", "branches",
"outputs", "finish_reasons"} in the order of the lines, on stdout or in `output_path`; "line" counts from 1
through all files, and with `reduce` the last output is that of one more branch, which reads the others.
Everything else goes to stderr. A line that cannot be continued is reported with its place and left out.

The same command again goes on where an interrupted one has stopped, and leaves a finished output as it is;
one that was begun with other settings or data (OUTPUT.run.json tells) is refused. With `num_workers` the
lines are cut into parts, whatever the number of workers, and `output_path` is a folder of part-00000.jsonl
and so on, each of which is there whole or not at all.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

import parallelmind as pm
from parallelmind import cli
from parallelmind.config import (
    Alignment,
    BranchAngle,
    Dtype,
    FrozenConfig,
    Pairs,
    Positions,
    Quantize,
    Visibility,
)
from parallelmind.errors import UserError, format_value, writing
from parallelmind.storage import atomic_file


class ModelPart(FrozenConfig):
    """What to decode with. null leaves a field to the adapter, or to the defaults of training where there is
    none.
    """

    base_model: str | None = Field(
        None, description="smollm2-135m, a local folder, or a hub id; null: the adapter's own"
    )
    lora_path: str | None = Field(None, description="adapter folder; null: the base model alone")
    dtype: Dtype | None = Field(None, description="type to compute in")
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
    sibling_penalty: float | None = Field(
        None, ge=0, description="columnar: taken off the attention scores of other branches"
    )
    visibility: Visibility | None = Field(None, description="what branches see of each other")
    align_to: Alignment | None = Field(None, description="whether prompts start or end together")

    def given(self) -> dict[str, Any]:
        """Keywords for `parallelmind.load_model_with_lora`."""
        values = {name: getattr(self, name) for name in ModelPart.model_fields}
        return {name: value for name, value in values.items() if value is not None}

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer, on the GPU where there is one.

        Raises UserError for what cannot be loaded or contradicts the adapter.
        """
        import torch

        from parallelmind.model.structure import to_gpu

        model, tokenizer = pm.load_model_with_lora(**self.given())
        return to_gpu(model) if torch.cuda.is_available() else model, tokenizer


class SamplingPart(FrozenConfig):
    """How to continue; ranges are those of `parallelmind.SamplingParams`."""

    max_new_tokens: int = Field(64, description="most new tokens per branch")
    temperature: float = Field(0.0, description="0 takes the likeliest token; above it, draws")
    top_k: int = Field(0, description="draw from the k likeliest tokens; 0: all")
    top_p: float = Field(1.0, description="draw from the fewest tokens that hold this probability; 1: all")
    min_p: float = Field(
        0.0, description="draw from tokens at least this likely, relative to the likeliest; 0: all"
    )
    repetition_penalty: float = Field(1.0, description="above 1 makes repetition less likely")
    stop: list[str] = Field([], description="texts that end a branch, and are not shown")
    seed: int | None = Field(None, description="same seed, same draws; null: new ones every time")
    ignore_eos: bool = Field(False, description="go on after the end-of-text token")

    def sampling(self) -> dict[str, Any]:
        """Keywords for `parallelmind.generate`. Raises UserError for a value out of range."""
        values = {name: getattr(self, name) for name in SamplingPart.model_fields}
        pm.SamplingParams(**values)
        return values


class GenerateConfig(SamplingPart, ModelPart):
    """One run of this command."""

    prompt: str | None = Field(None, description="one text to continue")
    prompts: list[str] = Field([], description="texts to continue side by side, as branches of one sample")
    main: str = Field("", description="text that all prompts share")
    data_path: str | None = Field(
        None,
        description="parallel JSONL, Parquet or .txt (a prompt a line): file, folder, glob, URL, or several with commas",
    )
    reduce: str | None = Field(
        None, min_length=1, description="prompt of a last branch, which reads main and all the others"
    )
    output_path: str | None = Field(
        None, description="JSONL file for the results, a folder with num_workers; null: stdout"
    )
    num_workers: int = Field(
        0, ge=0, description="Ray workers that share data_path, an engine in each; 0: this process"
    )
    ray_address: str | None = Field(
        None, description="Ray cluster to join; null: $RAY_ADDRESS, or a local one"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("prompt", "prompts", "data_path") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'prompt'}: give exactly one of prompt=…, prompts=[…,…] and data_path=…"
            )
        if self.main and self.data_path:
            raise ValueError(
                f"main={format_value(self.main)}: every line of data_path brings its own; write main into the lines"
            )
        if self.num_workers and not (self.data_path and self.output_path):
            raise ValueError(
                f"num_workers={self.num_workers}: shares data_path and writes files; give data_path and output_path"
            )
        return self


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        return cli.print_help(__doc__ or "", GenerateConfig)
    config = cli.parse(GenerateConfig, argv)
    config.sampling()  # before anything is loaded
    if config.data_path is None:
        return _continue_prompts(config)
    if config.num_workers:
        from workloads.generate import distributed as generate_ray  # starts no Ray yet, but imports it

        return generate_ray.continue_files(config)
    from workloads.generate import local as generate_file

    return generate_file.continue_files(config)


def _continue_prompts(config: GenerateConfig) -> None:
    """One sample: the text as it comes for a single prompt on stdout, else a row."""
    from workloads.generate.batch import GeneratedSample, speed

    output = Path(config.output_path).expanduser() if config.output_path else None
    if output and output.exists():
        raise UserError(f"output_path={output}: is there already; choose another name, or remove it")
    plain = bool(config.prompt) and output is None and config.reduce is None
    found = GeneratedSample.of(pm.Sample(config.main, config.prompts or [config.prompt or ""]), config.reduce)
    events = pm.stream(*config.load(), found.sample, reduce=config.reduce, **config.sampling())
    started, tokens = time.monotonic(), 0
    for event in events:
        found.add(event)
        tokens += 1
        if plain:
            print(event.text, end="", flush=True)
    text = "" if plain else json.dumps(found.row(), ensure_ascii=False)
    if output:
        with writing("output_path", output), atomic_file(output) as file:
            file.write(text + "\n")
    else:
        print(text, flush=True)
    print(speed(1, tokens, time.monotonic() - started), file=sys.stderr)
