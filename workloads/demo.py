"""End-to-end demo on generated data: train an adapter, then answer questions with it in a new process.

    python -m workloads.demo

Writes seeded parallel JSONL, scores the base model on held-out questions, fine-tunes SmolLM2 with 2D RoPE and
LoRA under Ray Train, and scores the adapter on the same questions in new processes: those of a passage at
once, and one by one. Each step is a command of its own, which is printed before it runs.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

from parallelmind import cli
from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.evaluation.facts import write_facts
from parallelmind.programs import module_name
from parallelmind.redaction import redact_uri
from parallelmind.tracking import absolute_uri
from workloads.common.devices import decide_training
from workloads.common.read_config import read_config
from workloads.train.same_name import find_run_dir

_TRAIN_PASSAGES, _HELD_OUT_PASSAGES, _QUESTIONS = 96, 6, 8

Scores = dict[str, Any]  # the JSON of `workloads.evaluate answers`


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        print(cli.flowing(__doc__ or ""))
        return
    if argv:
        raise UserError(
            f"{argv[0]}: the demo has no fields; python -m workloads.train demo {argv[0]} trains with others"
        )
    started = time.monotonic()
    config = decide_training(read_config(TrainConfig, ["demo"]))
    run_dir = find_run_dir(config)
    folder = run_dir.path.local
    folder.mkdir(parents=True, exist_ok=True)
    held_out = _write_data(config)
    base = _score("base model", folder / "base.json", held_out, ["rope_2d_ratio=0", "visibility=isolated"])
    rope = [f"{name}={getattr(config.rope, name)}" for name in ("rope_2d_ratio", "visibility", "positions")]
    untrained = _score("base model with 2D RoPE, before training", folder / "before.json", held_out, rope)
    _print_step("training")
    _run("workloads.train", "demo")
    adapter = run_dir.result.local
    with_adapter = f"lora_path={adapter}"
    trained = _score("adapter, in a new process", folder / "after.json", held_out, [with_adapter], show=2)
    alone = _score(
        "adapter, one by one", folder / "one_by_one.json", held_out, [with_adapter, "engine=one_by_one"]
    )
    _print_step("done")
    _print_scores({"base model": base, "with 2D RoPE, untrained": untrained, "adapter": trained})
    print(speed_line(trained, alone))
    _print_next_steps(adapter, absolute_uri(config.services.mlflow_uri), time.monotonic() - started)


def _write_data(config: TrainConfig) -> str:
    """Write training and held-out data. Returns the path of the latter."""
    _print_step("writing the data")
    train, held_out = config.data.data_path, str(config.data.validation_path)
    write_facts(train, _TRAIN_PASSAGES, seed=1, branches=_QUESTIONS)
    write_facts(held_out, _HELD_OUT_PASSAGES, seed=2, branches=_QUESTIONS)
    print(
        f"{train}: {_TRAIN_PASSAGES} passages; {held_out}: {_HELD_OUT_PASSAGES} other passages; "
        f"{_QUESTIONS} questions each"
    )
    return held_out


def _score(title: str, output: Path, held_out: str, settings: list[str], show: int = 0) -> Scores:
    """Score the held-out questions in a new process. `show`: number of passages to print with answers."""
    _print_step(f"scoring: {title}")
    _run(
        "workloads.evaluate",
        "answers",
        f"data_path={held_out}",
        *settings,
        f"show={show}",
        f"output_path={output}",
    )
    scores: Scores = json.loads(output.read_text(encoding="utf-8"))
    return scores


def _run(module: str, *arguments: str) -> None:
    """Run a command of this project. A failure ends the demo with the exit code of the command."""
    print("$ " + cli.as_typed(shlex.join(["python", "-m", module, *arguments])), flush=True)
    completed = subprocess.run([sys.executable, "-m", module_name(module), *arguments], check=False)
    if completed.returncode:
        sys.exit(completed.returncode)


def _print_step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _print_scores(scores_by_model: dict[str, Scores]) -> None:
    for name, scores in scores_by_model.items():
        print(f"exact match {scores['exact_match']:6.1%}   F1 {scores['f1']:6.1%}   {name}")


def speed_line(at_once: Scores, one_by_one: Scores) -> str:
    """The speed of both ways to ask the same questions, and how many answers are the same."""
    answers = [list(chain.from_iterable(scores["predictions"])) for scores in (at_once, one_by_one)]
    same = sum(left == right for left, right in zip(*answers, strict=True))
    return (
        f"{_QUESTIONS} at once: {at_once['questions_per_second']:.1f} questions/s; "
        f"one by one: {one_by_one['questions_per_second']:.1f}; same answers: {same} of {len(answers[0])}"
    )


def _print_next_steps(adapter: Path, mlflow_uri: str, seconds: float) -> None:
    text = f"""
{seconds / 60:.1f} minutes in all. Where to look next:
  adapter   {adapter}
  metrics   .venv/bin/mlflow ui --host 127.0.0.1 --backend-store-uri {redact_uri(mlflow_uri)}
  chat      .venv/bin/python -m workloads.chat lora_path={adapter}
  serve     .venv/bin/python -m serving lora_path={adapter} port=8000
  generate  .venv/bin/python -m workloads.generate lora_path={adapter} prompt="The sky is"
"""
    print(cli.as_typed(text))


if __name__ == "__main__":
    cli.run(main)
