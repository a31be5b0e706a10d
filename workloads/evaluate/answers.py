"""The scores of a model's answers, for `python -m workloads.evaluate answers`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Self

from pydantic import Field, model_validator
from rich.table import Table

from parallelmind import cli
from parallelmind.evaluation.backends import BackendName
from parallelmind.evaluation.qa_eval import (
    RecordAnswers,
    Scores,
    answer_records,
    read_question_records,
    score_answers,
)
from workloads.common.inference_config import InferenceModelConfig
from workloads.evaluate.output import console, output_file, write_json


class AnswersConfig(InferenceModelConfig):
    """One run of `evaluate answers`."""

    data_path: str = Field(
        min_length=1, description="parallel JSONL; every branch has a prompt and a completion"
    )
    max_records: int = Field(16, ge=1, description="records to answer, from the start of the file")
    max_new_tokens: int = Field(12, ge=1, description="longest answer, in tokens")
    engine: BackendName = Field(
        "parallel", description="questions as branches of a sequence, each alone, or as padded rows"
    )
    at_once: int | None = Field(
        None, ge=1, description="questions of a record that are asked together; null: all"
    )
    records_at_once: int = Field(
        1, ge=1, description="records that one engine works on side by side (engine=parallel)"
    )
    show: int = Field(1, ge=0, description="records to print with passage, questions and answers")
    output_path: str | None = Field(None, description="JSON file for the scores")

    @model_validator(mode="after")
    def _alone(self) -> Self:
        if self.engine == "one_by_one" and self.at_once not in (None, 1):
            raise ValueError(
                f"at_once={self.at_once}: engine=one_by_one asks one question at a time; drop one of the two"
            )
        if self.engine != "parallel" and self.records_at_once > 1:
            raise ValueError(
                f"records_at_once={self.records_at_once}: needs engine=parallel; drop one of the two"
            )
        return self


def answers(argv: list[str]) -> None:
    config = cli.parse(AnswersConfig, argv)
    output = output_file(config.output_path, ".json")
    records = read_question_records(config.data_path, config.max_records)
    model, tokenizer = config.load_model()
    asked = cli.tracked(
        records, "answering", len(records), lambda done: f"{done} of {len(records)} records answered"
    )
    found = answer_records(
        model,
        tokenizer,
        asked,
        engine=config.engine,
        at_once=config.at_once,
        records_at_once=config.records_at_once,
        max_new_tokens=config.max_new_tokens,
    )
    items, scores = score_answers(found)
    for item in items[: config.show]:
        console().print(table(item))
    print(line(scores), flush=True)
    if output:
        write_json(output, {**asdict(scores), "config": config.model_dump(mode="json")})


def table(item: RecordAnswers) -> Table:
    """Passage and answers of one record, for a terminal."""
    drawn = Table(title=item.main or None, title_justify="left", title_style="italic", expand=False)
    for header in ("branch", "question", "answer", "expected"):
        drawn.add_column(header)
    for index, (question, found, expected) in enumerate(
        zip(item.questions, item.predictions, item.references, strict=True)
    ):
        short = question.removeprefix("Question: ").removesuffix("\nAnswer:")
        drawn.add_row(str(index), short, found, " / ".join(expected))
    return drawn


def line(scores: Scores) -> str:
    memory = (
        ""
        if scores.peak_kv_bytes is None
        else f", at most {scores.peak_kv_bytes / 2**20:.1f} MiB of keys and values"
    )
    return (
        f"exact match {scores.exact_match:.1%}  F1 {scores.f1:.1%}  over {scores.questions} questions, "
        f"{scores.questions_per_second:.2f} questions/s, {scores.tokens_per_second:.1f} tokens/s{memory}"
    )
