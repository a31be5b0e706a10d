"""Measure a model or its adapter on held-out text, or see which models can hold parallel branches.

    python -m workloads.evaluate answers data_path=held_out.jsonl lora_path=runs/demo/adapter
    python -m workloads.evaluate answers data_path=held_out.jsonl patch_rope=false
    python -m workloads.evaluate support
    python -m workloads.evaluate support model_types=llama,gptj,mamba --csv

answers: every record's questions (branches with prompt and completion) are answered in parallel branches of one sequence;
exact match and F1 are those of SQuAD. The answer is the first line that the model writes.

support: a tiny random model of every causal-LM type of the installed transformers is built, patched and held against
every law, which takes some minutes for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.table import Table

from parallelmind import cli
from parallelmind.config import Part
from parallelmind.errors import UserError
from parallelmind.evaluation.answering import Answered, Scores, answer, question_records, score
from workloads.generate import ModelPart
from workloads.support import SupportConfig, support


class AnswersConfig(ModelPart):
    """One run of `evaluate answers`."""

    data_path: str = Field(min_length=1, description="parallel JSONL; every branch has a prompt and a completion")
    max_records: int = Field(16, ge=1, description="records to answer, from the start of the file")
    max_new_tokens: int = Field(12, ge=1, description="longest answer, in tokens")
    show: int = Field(1, ge=0, description="records to print with passage, questions and answers")
    output_path: str | None = Field(None, description="JSON file for the scores")


def main(argv: list[str]) -> None:
    kinds: dict[str, tuple[type[Part], Callable[[list[str]], None]]] = {
        "answers": (AnswersConfig, answers),
        "support": (SupportConfig, support),
    }
    kind = argv[0] if argv else ""
    if kind not in kinds:
        if cli.wants_help(argv):
            return print(f"{(__doc__ or '').strip()}\n\nevaluate answers --help and evaluate support --help list the fields.")
        raise UserError(f"{f'evaluate {kind}'.strip()}: unknown evaluation; choose one of {', '.join(kinds)}")
    fields, run = kinds[kind]
    return cli.print_help(__doc__ or "", fields) if cli.wants_help(argv) else run(argv[1:])


def answers(argv: list[str]) -> None:
    config = cli.parse(AnswersConfig, argv)
    records = question_records(config.data_path, config.max_records)
    model, tokenizer = config.load()
    items, scores = score(answer(model, tokenizer, records, max_new_tokens=config.max_new_tokens))
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    for item in items[: config.show]:
        console.print(table(item))
    print(line(scores), flush=True)
    if config.output_path:
        Path(config.output_path).write_text(json.dumps(asdict(scores), indent=2) + "\n", encoding="utf-8")


def table(item: Answered) -> Table:
    """Passage and answers of one record, for a terminal."""
    drawn = Table(title=item.main or None, title_justify="left", title_style="italic", expand=False)
    for header in ("branch", "question", "answer", "expected"):
        drawn.add_column(header)
    for index, (question, found, expected) in enumerate(zip(item.questions, item.predictions, item.references, strict=True)):
        short = question.removeprefix("Question: ").removesuffix("\nAnswer:")
        drawn.add_row(str(index), short, found, expected)
    return drawn


def line(scores: Scores) -> str:
    return (
        f"exact match {scores.exact_match:.1%}  F1 {scores.f1:.1%}  over {scores.questions} questions, "
        f"{scores.tokens_per_second:.1f} tokens/s"
    )


if __name__ == "__main__":
    cli.run(main)
