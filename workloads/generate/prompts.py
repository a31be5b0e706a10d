"""Generate from the prompts of the command line, as one sample."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import parallelmind as pm
from parallelmind.engine.linear import linearized
from parallelmind.engine.record_prompt import RecordPrompt
from parallelmind.errors import UserError, translate_write_errors
from parallelmind.storage import atomic_file
from workloads.common.empty_answers import ended_at_once
from workloads.generate.config import GenerateConfig
from workloads.generate.progress import throughput
from workloads.generate.results import GeneratedSample


def generate_from_prompts(config: GenerateConfig) -> None:
    """Stream plain text for a single prompt on stdout; write one JSON row in every other case.

    Raises UserError if `output_path` exists or the model cannot decode the prompts, and DecodingError for a
    branch that ends with an error.
    """
    prompt, prompts, reduce = config.input.prompt, config.input.prompts, config.input.reduce
    output = Path(config.run.output_path) if config.run.output_path else None
    if output and output.exists():
        raise UserError(f"output_path={output}: already exists; choose another name, or remove it")
    plain_text = bool(prompt) and output is None and reduce is None
    sample = pm.Sample(config.input.main, prompts or [prompt or ""], reduce)
    generated = GeneratedSample.empty(RecordPrompt(sample))
    events = linearized(pm.stream(*config.model.load(), sample, **config.sampling.to_kwargs()))
    started, tokens = time.monotonic(), 0
    for event in events:
        event.raise_error()
        generated.append(event)
        tokens += event.token is not None
        if plain_text:
            print(event.text, end="", flush=True)
    row = json.dumps(generated.to_row(), ensure_ascii=False)
    if output:
        with translate_write_errors("output_path", output), atomic_file(output) as file:
            file.write(row + "\n")
    else:
        print("" if plain_text else row, flush=True)
    for index in generated.empty_segments:
        print(_reason(config, sample, index), file=sys.stderr)
    print(throughput(1, tokens, time.monotonic() - started), file=sys.stderr)


def _reason(config: GenerateConfig, sample: pm.Sample, index: int) -> str:
    """Why a segment of the sample has no text."""
    subject = f"branch {index + 1}" if index < len(sample.branches) else "reduce"
    return ended_at_once(subject, config.model.lora_path, bool(config.sampling.stop))
