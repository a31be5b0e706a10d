"""The main job from start to end, on generated data: train an adapter, then answer in a new process.

    python -m workloads.demo

Writes a seeded parallel JSONL, measures the base model on held-out questions, fine-tunes SmolLM2 with 2D RoPE
and LoRA under Ray Train, and lets a new process load the adapter and answer the same questions. Every step is
a command of its own, printed before it runs.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from parallelmind import cli
from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.evaluation.facts import write_facts
from parallelmind.tracking import absolute_uri
from workloads.common.read_config import read_config
from workloads.train.command import ADAPTER, run_place

_TRAIN_PASSAGES, _HELD_OUT_PASSAGES = 96, 6


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        print(cli.flowing(__doc__ or ""))
        return
    if argv:
        raise UserError(
            f"{argv[0]}: the demo has no fields; python -m workloads.train demo {argv[0]} trains with others"
        )
    started = time.monotonic()
    config = read_config(TrainConfig, ["demo"])
    folder = run_place(config).local
    _say("writing the data")
    write_facts(config.data.data_path, _TRAIN_PASSAGES, seed=1)
    held_out = str(config.data.validation_path)
    write_facts(held_out, _HELD_OUT_PASSAGES, seed=2)
    print(
        f"{config.data.data_path}: {_TRAIN_PASSAGES} passages; {held_out}: {_HELD_OUT_PASSAGES} others; 8 questions each"
    )
    rope = [f"{name}={getattr(config.rope, name)}" for name in ("rope_2d_ratio", "visibility", "positions")]
    folder.mkdir(parents=True, exist_ok=True)
    untouched = _answers(
        "the base model as it is", folder / "base.json", held_out, ["rope_2d_ratio=0", "visibility=isolated"]
    )
    before = _answers("the base model with 2D RoPE, before training", folder / "before.json", held_out, rope)
    _say("training")
    _run("workloads.train", "demo")
    trained = [f"lora_path={folder / ADAPTER}"]
    after = _answers("the adapter, loaded by a new process", folder / "after.json", held_out, trained, show=2)
    _say("done")
    _summary(config, folder, (untouched, before, after), time.monotonic() - started)


def _answers(title: str, output: Path, held_out: str, settings: list[str], show: int = 0) -> dict[str, float]:
    """Scores on the held-out questions, by a process of its own."""
    _say(f"answering: {title}")
    _run(
        "workloads.evaluate",
        "answers",
        f"data_path={held_out}",
        *settings,
        f"show={show}",
        f"output_path={output}",
    )
    scores: dict[str, float] = json.loads(output.read_text(encoding="utf-8"))
    return scores


def _run(module: str, *arguments: str) -> None:
    print("$ " + shlex.join(["python", "-m", module, *arguments]), flush=True)
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _summary(config: TrainConfig, folder: Path, scores: tuple[dict[str, float], ...], seconds: float) -> None:
    names = ("base model", "with 2D RoPE, untrained", "adapter")
    for name, found in zip(names, scores, strict=True):
        speed = f"{found['tokens_per_second']:6.1f} tokens/s"
        print(f"exact match {found['exact_match']:6.1%}   F1 {found['f1']:6.1%}   {speed}   {name}")
    adapter = folder / ADAPTER
    uri = absolute_uri(config.services.mlflow_uri)
    print(f"""
{seconds / 60:.1f} minutes in all. Where to look next:
  adapter   {adapter}
  metrics   .venv/bin/mlflow ui --host 127.0.0.1 --backend-store-uri {uri}
  chat      .venv/bin/python -m workloads.chat lora_path={adapter}
  serve     .venv/bin/python -m serving lora_path={adapter} port=8000
  generate  .venv/bin/python -m workloads.generate lora_path={adapter} prompt="The sky is"
""")


if __name__ == "__main__":
    cli.run(main)
