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

import parallelmind as pm
from parallelmind import cli
from parallelmind.errors import UserError, writing
from parallelmind.storage import atomic_file
from workloads.generate.config import GenerateConfig


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        return cli.print_help(__doc__ or "", GenerateConfig)
    config = cli.parse(GenerateConfig, argv)
    config.sampling_kwargs()  # before anything is loaded
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
    events = pm.stream(*config.load_model(), found.sample, reduce=config.reduce, **config.sampling_kwargs())
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
