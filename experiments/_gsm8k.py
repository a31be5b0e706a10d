"""Shared by the experiments on branch tax: SmolLM2 on the first 96 tokens of GSM8K's problems and answers.

    python -m experiments._gsm8k path/to/gsm8k.train.jsonl runs/data/gsm8k.train.jsonl
    python -m experiments._gsm8k path/to/gsm8k.test.jsonl runs/data/gsm8k.test.jsonl

The problems are independent texts, so the branches of a sample are unrelated and any cost of siblings
is branch tax.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments._command import run as run_command
from parallelmind.config import TrainConfig

# The published scheme: the low pairs rotate by branch, all other pairs by the flat index.
PUBLISHED: dict[str, Any] = {
    "positions": "flat",
    "pairs": "low",
    "branch_angle": "alone",
    "sibling_penalty": 0.0,
    "branch_stride": 128,
    "visibility": "columnar",
}


def run(**changes: Any) -> TrainConfig:
    """Return the training run of a trial, which takes minutes on one CPU."""
    settings: dict[str, Any] = {
        "data_path": "runs/data/gsm8k.train.jsonl",
        "validation_path": "runs/data/gsm8k.test.jsonl",
        "max_branch_tokens": 96,
        "batch_size": 8,
        "batch_by_samples": False,
        "learning_rate": 5e-4,
        "validation_branches": [1, 2, 4, 8, 16, 32],
        "validation_samples": 64,
        "validate_every": 1000,
        "checkpoint_every": 20,
        "log_every": 10,
    }
    return TrainConfig(**(settings | changes))


def main(source: str, output: str) -> None:
    """Write the problems as parallel JSONL."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(source, encoding="utf-8") as problems, open(path, "w", encoding="utf-8") as file:
        for problem in map(json.loads, problems):
            file.write(json.dumps({"text": f"{problem['question']}\n{problem['answer']}"}) + "\n")


if __name__ == "__main__":
    run_command(main)
