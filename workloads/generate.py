"""Continue prompts with a base model and, where one is given, its adapter.

    python -m workloads.generate prompt="Once upon a time"
    python -m workloads.generate main="A passage." prompts="[Who is it?, Where is it?]" max_new_tokens=32
    python -m workloads.generate lora_path=runs/demo/adapter data_path=samples.jsonl output_path=out.jsonl

`prompts` are branches of one sample that share `main`. `data_path` is parallel JSONL (every line a sample, continued after
its prompts), or a .txt file (every line a prompt of its own). Results are JSONL, {"main", "branches", "outputs"}, on stdout
or in `output_path`; a single prompt is answered on stdout in plain text. Everything else goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, TextIO

from pydantic import Field, model_validator

import parallelmind as pm
from parallelmind.config import Alignment, Dtype, Pairs, Part, Positions, Quantize, Visibility
from parallelmind.data.encode import encode_text
from parallelmind.data.records import Branch, Record, RecordError, parse_line
from parallelmind.errors import UserError
from workloads import cli


class ModelPart(Part):
    """What to decode with. null leaves a field to the adapter, or to the defaults of training where there is none."""

    base_model: str | None = Field(None, description="smollm2-135m, a local folder, or a hub id; null: the adapter's own")
    lora_path: str | None = Field(None, description="adapter folder; null: the base model alone")
    dtype: Dtype | None = Field(None, description="compute type of the base weights")
    quantize: Quantize | None = Field(None, description="keep the base weights in fewer bits (bitsandbytes)")
    trust_remote_code: bool = Field(False, description="allow a hub model to run its own code")
    patch_rope: bool | None = Field(None, description="false: leave the model as it is, without 2D RoPE")
    rope_2d_ratio: float | None = Field(None, ge=0, le=1, description="share of rotary pairs driven by (branch, time)")
    pairs: Pairs | None = Field(None, description="which pairs the ratio selects")
    branch_stride: int | None = Field(None, ge=1, description="distance between neighbouring branch coordinates")
    positions: Positions | None = Field(None, description="what drives the other pairs")
    visibility: Visibility | None = Field(None, description="what branches see of each other")
    align_to: Alignment | None = Field(None, description="whether prompts start or end together")

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer. Raises UserError for what cannot be loaded or contradicts the adapter."""
        given = {name: getattr(self, name) for name in ModelPart.model_fields}
        return pm.load_model_with_lora(**{name: value for name, value in given.items() if value is not None})


class SamplingPart(Part):
    """How to continue; ranges are those of `parallelmind.SamplingParams`."""

    max_new_tokens: int = Field(64, description="most new tokens per branch")
    temperature: float = Field(0.0, description="0 takes the likeliest token; above it, draws")
    top_k: int = Field(0, description="draw from the k likeliest tokens; 0: all")
    top_p: float = Field(1.0, description="draw from the fewest tokens that hold this probability; 1: all")
    min_p: float = Field(0.0, description="draw from tokens at least this likely, relative to the likeliest; 0: all")
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
    data_path: str | None = Field(None, description="parallel JSONL, or .txt with one prompt per line")
    output_path: str | None = Field(None, description="JSONL file for the results; null: stdout")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("prompt", "prompts", "data_path") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'prompt'}: give exactly one of prompt=…, prompts=[…,…] and data_path=…")
        if self.main and self.data_path:
            raise ValueError(f"main={self.main!r}: every line of data_path brings its own; write main into the lines")
        return self


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        return cli.print_help(__doc__ or "", GenerateConfig)
    config = cli.parse(GenerateConfig, argv)
    sampling = config.sampling()
    if config.data_path and not Path(config.data_path).is_file():
        raise UserError(f"data_path={config.data_path}: no such file; give parallel JSONL or a .txt file")
    model, tokenizer = config.load()
    if config.prompt and not config.output_path:
        return _answer(model, tokenizer, pm.Sample(config.main, [config.prompt]), sampling)
    with _output(config.output_path) as out:
        Job(model, tokenizer, sampling, out).run(config)
    return None


class Job:
    """Samples in, JSONL out; a bad line is reported, counted and left out."""

    def __init__(self, model: Any, tokenizer: Any, sampling: dict[str, Any], out: TextIO) -> None:
        self.model, self.tokenizer, self.sampling, self.out = model, tokenizer, sampling, out
        self.samples = self.tokens = self.bad = 0
        self.started = time.monotonic()

    def run(self, config: GenerateConfig) -> None:
        if config.data_path is None:
            self.write(pm.Sample(config.main, config.prompts or [config.prompt or ""]))
        else:
            self.run_file(Path(config.data_path))
        print(self.rate(), file=sys.stderr)

    def run_file(self, path: Path) -> None:
        with path.open("rb") as lines:
            total = sum(1 for line in lines if line.strip())
        for number, line in _tracked(path, total, self):
            try:
                self.write(self.read(path, line))
            except (RecordError, UserError) as error:
                self.bad += 1
                print(f"{path}:{number}: skipped: {error}", file=sys.stderr)
        if self.bad:
            print(f"{path}: {self.bad} of {total} lines skipped", file=sys.stderr)
        if not self.samples:
            raise UserError(f"data_path={path}: holds no usable line; give one sample per line")

    def read(self, path: Path, line: bytes) -> pm.Sample:
        if path.suffix == ".txt":
            return pm.Sample(branches=[line.decode("utf-8", errors="replace").rstrip("\r\n")])
        return prompt_of(parse_line(line), self.tokenizer)

    def write(self, sample: pm.Sample) -> None:
        texts = [""] * len(sample.branches)
        for event in pm.stream(self.model, self.tokenizer, sample, **self.sampling):
            texts[event.branch] += event.text
            self.tokens += 1
        row = {"main": sample.main, "branches": list(sample.branches), "outputs": texts}
        print(json.dumps(row, ensure_ascii=False), file=self.out, flush=True)
        self.samples += 1

    def rate(self) -> str:
        seconds = time.monotonic() - self.started
        return f"{self.samples} samples, {self.tokens} tokens in {seconds:.1f} s: {self.tokens / max(seconds, 1e-9):.1f} tokens/s"


def prompt_of(record: Record, tokenizer: Any) -> pm.Sample:
    """What a record gives to continue: prompts without completions, texts up to their answer offset."""
    return pm.Sample(record.main, [_prompt(branch, tokenizer, first=not record.main) for branch in record.branches])


def _prompt(branch: Branch, tokenizer: Any, first: bool) -> str | list[int]:
    if branch.completion is not None or branch.answer_offset == 0:
        return branch.body
    ids = encode_text(tokenizer, branch.body, first) if isinstance(branch.body, str) else branch.body
    return ids[: branch.answer_offset]


def _answer(model: Any, tokenizer: Any, sample: pm.Sample, sampling: dict[str, Any]) -> None:
    """Plain text, as it comes."""
    started, tokens = time.monotonic(), 0
    for event in pm.stream(model, tokenizer, sample, **sampling):
        tokens += 1
        print(event.text, end="", flush=True)
    print(flush=True)
    seconds = time.monotonic() - started
    print(f"{tokens} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.1f} tokens/s", file=sys.stderr)


def _output(path: str | None) -> Any:
    if path is None:
        return nullcontext(sys.stdout)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_path={path}: cannot be written ({error.strerror}); give a file in a writable folder") from error


def _tracked(path: Path, total: int, job: Job) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank: a bar with rate and ETA on a terminal, a line now and then elsewhere."""
    with path.open("rb") as lines:
        numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        told = f"of {total} lines"
        yield from cli.tracked(numbered, "generating", total, lambda _: f"{job.samples + job.bad} {told}; {job.rate()}")


if __name__ == "__main__":
    cli.run(main)
