"""Turn common sources into parallel JSONL, or look at parallel JSONL.

    python -m workloads.convert data_path=xquad.en.json output_path=xquad.jsonl
    python -m workloads.convert data_path=train.jsonl output_path=train.parallel.jsonl.gz chat=true base_model=org/name
    python -m workloads.convert data_path="books/*.txt.gz" output_path=books.jsonl chunk_tokens=256
    python -m workloads.convert dataset=openai/gsm8k subset=main output_path=gsm8k.jsonl
    python -m workloads.convert --inspect FILE

Sources, recognised by the first record of each file unless `source` names one:
    messages   {"messages": [{"role", "content"}]}, as OpenAI writes them
    sharegpt   {"conversations": [{"from", "value"}]}
    alpaca     {"instruction", "input", "output"}
    pairs      {"prompt", "response" or "completion" or "output"}, or {"question", "answer"}
    squad      articles with paragraphs and their questions, or rows with context, question and answers
    hotpotqa   rows with titles and sentences as context, question and answer
    text       .txt files, or one column of CSV or other records, cut into chunks
in .json, .jsonl, .csv or .txt, each also with .gz, or in .parquet. Conversations go through the chat template of base_model,
and so do alpaca and pairs with chat=true; passages become main and their questions branches. Bad records are reported on
stderr and left out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, TextIO

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from parallelmind import cli
from parallelmind.config import ModelConfig
from parallelmind.data.convert.converter import Converter, ConvertSettings
from parallelmind.data.convert.items import Bad
from parallelmind.data.convert.reading import dataset_items
from parallelmind.data.files import find_files
from parallelmind.errors import UserError, translate_write_errors
from parallelmind.model.base_model import load_tokenizer
from parallelmind.storage import atomic_file

_SHOWN = 10
_ENDINGS = (".jsonl", ".jsonl.gz")


class ConvertConfig(ConvertSettings):
    """One run of this command."""

    data_path: str | None = Field(
        None, description="source files: a file, glob or URL, or several with commas between"
    )
    dataset: str | None = Field(None, description="in place of data_path, a data set of the Hugging Face hub")
    subset: str | None = Field(None, description="dataset: which of its configurations, where it has several")
    split: str = Field("train", min_length=1, description="dataset: which split")
    output_path: str = Field(min_length=1, description="parallel JSONL to write: .jsonl or .jsonl.gz")
    strict: bool = Field(False, description="stop at the first bad source record instead of counting it")
    base_model: str = Field(
        "smollm2-135m",
        min_length=1,
        description="model whose tokenizer and chat template to use, where either is needed",
    )
    trust_remote_code: bool = Field(False, description="allow a hub model's tokenizer to run its own code")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("data_path", "dataset") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'data_path'}: give exactly one of data_path=… and dataset=…"
            )
        if not self.output_path.endswith(_ENDINGS):
            raise ValueError(
                f"output_path={self.output_path}: training would not find it; end it in {' or '.join(_ENDINGS)}"
            )
        return self

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(
            ModelConfig(base_model=self.base_model, trust_remote_code=self.trust_remote_code)
        )


def main(argv: list[str]) -> None:
    if "--inspect" in argv:
        from workloads.data.inspect import main as inspect

        return inspect([item for item in argv if item != "--inspect"])
    if cli.wants_help(argv):
        return cli.print_help(__doc__ or "", ConvertConfig)
    return print(Job(cli.parse(ConvertConfig, argv)).run())


class Job:
    """Source records in, one file of parallel JSONL out; a bad record is reported, counted and left out."""

    def __init__(self, config: ConvertConfig) -> None:
        self.config = config
        self.converter = Converter(config, config.tokenizer)
        self.written = self.branches = self.bad = 0

    def run(self) -> str:
        """Write the file; returns the counts in one line. Raises UserError, and then leaves the output as it
        was.
        """
        results = self.results()
        output = self.config.output_path
        with translate_write_errors("output_path", output), atomic_file(Path(output).expanduser()) as out:
            for result in cli.tracked(results, "converting", None, lambda _: self.counts()):
                self.take(result, out)
            if self.bad > _SHOWN:
                print(f"… and {self.bad - _SHOWN} more bad records", file=sys.stderr)
            if not self.written:
                raise UserError(
                    f"{self.source}: gives no record ({self.counts()}); look at the source, or set source=…"
                )
        return self.counts()

    @property
    def source(self) -> str:
        return (
            f"dataset={self.config.dataset}" if self.config.dataset else f"data_path={self.config.data_path}"
        )

    def results(self) -> Iterable[dict[str, Any] | Bad]:
        config = self.config
        if config.dataset:
            return self.converter.items(dataset_items(config.dataset, config.subset, config.split))
        files = find_files(config.data_path or "")
        output = os.path.realpath(Path(config.output_path).expanduser())
        if output in map(os.path.realpath, files):
            raise UserError(
                f"output_path={config.output_path}: is one of the files to read; give another name"
            )
        return (result for file in files for result in self.converter.file(file))

    def take(self, result: dict[str, Any] | Bad, out: TextIO) -> None:
        if not isinstance(result, Bad):
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
            self.written += 1
            self.branches += len(result.get("branches", [result]))
            return
        if self.config.strict:
            raise UserError(
                f"{self.source}: {result}; mend the record, or set strict=false to leave out bad ones"
            )
        self.bad += 1
        if self.bad <= _SHOWN:
            print(f"left out: {result}", file=sys.stderr)

    def counts(self) -> str:
        without = self.converter.unanswered
        left_out = f", {without} questions without an answer left out" if without else ""
        return f"{self.converter.read} records in, {self.written} records out, {self.branches} branches, {self.bad} bad{left_out}"
