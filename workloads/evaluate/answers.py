"""`evaluate answers`: answer the questions of held-out records and score the answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Self

from pydantic import Field, model_validator
from rich.table import Table
from rich.text import Text

from parallelmind import cli
from parallelmind.config import FrozenConfig, GroupedConfig, OutputPath
from parallelmind.evaluation.backends import BackendName
from parallelmind.evaluation.qa_eval import (
    RecordAnswers,
    Scores,
    answer_records,
    score_answers,
)
from parallelmind.evaluation.qa_records import read_question_records
from workloads.common.empty_answers import ended_at_once
from workloads.common.inference_config import InferenceModelConfig
from workloads.evaluate.output import check_outputs, console, output_file, write_json


class QuestionsConfig(FrozenConfig):
    """Questions."""

    data_path: str = Field(
        min_length=1,
        description=(
            "parallel JSONL, Parquet or Arrow; branches have prompt and completion, "
            "or are documents that the question in the reduce reads"
        ),
    )
    max_records: int = Field(16, ge=1, description="records to answer, from the start of the file")
    max_new_tokens: int = Field(12, ge=1, description="maximum length of an answer, in tokens")


class BackendConfig(FrozenConfig):
    """Decoding."""

    engine: BackendName = Field(
        "parallel",
        description="questions as branches of one sequence, one sequence per question, or padded rows",
    )
    at_once: int | None = Field(
        None, ge=1, description="questions of a record that are decoded together; null: all"
    )
    records_at_once: int = Field(
        1, ge=1, description="records that one engine decodes concurrently (engine=parallel)"
    )

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine == "one_by_one" and self.at_once not in (None, 1):
            raise ValueError(
                f"at_once={self.at_once}: engine=one_by_one decodes one question at a time; "
                "drop one of the two"
            )
        if self.engine != "parallel" and self.records_at_once > 1:
            raise ValueError(
                f"records_at_once={self.records_at_once}: needs engine=parallel; drop one of the two"
            )
        return self


class AnswersOutputConfig(FrozenConfig):
    """Output."""

    show: int = Field(1, ge=0, description="records to print with passage, questions and answers")
    output_path: OutputPath | None = Field(None, description="JSON file for the scores")


class AnswersConfig(GroupedConfig):
    """Run of `evaluate answers`."""

    model: InferenceModelConfig
    questions: QuestionsConfig
    backend: BackendConfig
    output: AnswersOutputConfig


def evaluate_answers(argv: list[str]) -> None:
    """Answer the questions, print the scores, and write them as JSON if requested."""
    config = cli.parse(AnswersConfig, argv)
    output = output_file(config.output.output_path, ".json")
    check_outputs(output, data_path=[config.questions.data_path], **config.model.paths())
    records = read_question_records(
        config.questions.data_path,
        config.questions.max_records,
        config.backend.engine,
        config.backend.at_once,
    )
    model, tokenizer = config.model.load()
    total = len(records)
    tracked = cli.tracked(records, "answering", total, lambda done: f"{done} of {total} records answered")
    answered, scores = score_answers(
        answer_records(
            model,
            tokenizer,
            tracked,
            engine=config.backend.engine,
            at_once=config.backend.at_once,
            records_at_once=config.backend.records_at_once,
            max_new_tokens=config.questions.max_new_tokens,
        )
    )
    for record in answered[: config.output.show]:
        _print_answers(record)
    print(_scores_line(scores), flush=True)
    if empty := sum(not prediction for record in answered for prediction in record.predictions):
        print(ended_at_once(f"{empty} of {scores.questions} answers", config.model.lora_path), flush=True)
    if output:
        predictions = [record.predictions for record in answered]
        write_json(
            output, {**asdict(scores), "predictions": predictions, "config": config.model_dump(mode="json")}
        )


def _print_answers(record: RecordAnswers) -> None:
    """Print passage, beginnings of the documents, questions and answers of one record."""
    table = Table(title=Text(record.main, style="italic") if record.main else None, title_justify="left")
    for header in ("branch", "question", "answer", "expected"):
        table.add_column(header)
    rows = zip(record.places, record.questions, record.predictions, record.references, strict=True)
    for place, question, prediction, references in rows:
        short_question = question.removeprefix("Question: ").removesuffix("\nAnswer:")
        table.add_row(*map(Text, (place, short_question, prediction, " / ".join(references))))
    for branch, document in record.documents.items():
        line = Text(f"branch {branch}: {' '.join(document.split())}")
        console().print(line, no_wrap=True, overflow="ellipsis")
    console().print(table)


def _scores_line(scores: Scores) -> str:
    memory = ""
    if scores.peak_kv_bytes is not None:
        memory = f", peak KV cache {scores.peak_kv_bytes / 2**20:.1f} MiB"
    return (
        f"exact match {scores.exact_match:.1%}  F1 {scores.f1:.1%}  over {scores.questions} questions, "
        f"{scores.questions_per_second:.2f} questions/s, {scores.tokens_per_second:.1f} tokens/s{memory}"
    )
