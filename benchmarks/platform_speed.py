"""`python -m benchmarks.platform_speed platform|bare`: tokens/s of the training command or of a bare loop."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.learner import Learner
from benchmarks.text import tokenizer
from parallelmind.config import TrainConfig
from parallelmind.config.yaml_file import save_yaml
from parallelmind.data.files import file_parts, find_files
from parallelmind.data.packing import EpochSeed, sample_batches
from parallelmind.data.tables import from_tables, to_table
from parallelmind.data.tokenise import tokenise_part
from parallelmind.evaluation.facts import write_facts

_STEPS, _WARM_UP = 30, 6


def _config(folder: str, max_steps: int) -> TrainConfig:
    write_facts(f"{folder}/data.jsonl", 96, seed=1)
    return TrainConfig(
        name="speed",
        data_path=f"{folder}/data.jsonl",
        output_dir=f"{folder}/runs",
        mlflow_uri=f"sqlite:///{folder}/mlflow.db",
        batch_size=2,
        max_steps=max_steps,
        epochs=9,
        log_every=min(_WARM_UP, max_steps),
    )


def training_lines(max_steps: int) -> Iterator[str]:
    """Run the training command and yield every line of its output."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder, max_steps)
        path = Path(folder) / "config.yaml"
        save_yaml(config, path)
        command = [sys.executable, "-m", "workloads.train", str(path)]
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        assert process.stdout is not None
        yield from process.stdout
        if process.wait():
            raise RuntimeError("the training command failed")


def platform() -> float:
    """Mean tokens/s that the training command logs, without its first interval."""
    speeds = [
        float(speed)
        for line in training_lines(_STEPS)
        for speed in re.findall(r"^step \d+/.* ([\d.]+) tok/s", line)
    ]
    return fmean(speeds[1:])


def bare() -> float:
    """Tokens/s of training steps on the same batches without data pipeline, Ray and logging."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder, _STEPS)
        tables = [
            to_table(tokenise_part(part, tokenizer(), config.data))
            for part in file_parts(find_files(config.data.data_path))
        ]
    grouped = sample_batches(from_tables(tables, Counter()), config.data, EpochSeed(config.optimizer.seed))
    batches = [group.collate(config.rope, 0) for group in islice(grouped, _STEPS)]
    learner = Learner(config.rope)
    for batch in batches[:_WARM_UP]:
        learner.step(batch)
    start = time.perf_counter()
    for batch in batches[_WARM_UP:]:
        learner.step(batch)
    return sum(batch.tokens for batch in batches[_WARM_UP:]) / (time.perf_counter() - start)


if __name__ == "__main__":
    torch.manual_seed(0)
    print({"platform": platform, "bare": bare}[sys.argv[1]]())
