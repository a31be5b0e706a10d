"""Convert common sources to parallel JSONL, or inspect parallel JSONL.

    python -m workloads.convert data_path=xquad.en.json output_path=xquad.jsonl
    python -m workloads.convert data_path=chats.jsonl output_path=train.jsonl.gz chat=true base_model=org/name
    python -m workloads.convert data_path="books/*.txt.gz" output_path=books.jsonl chunk_tokens=256
    python -m workloads.convert dataset=openai/gsm8k subset=main output_path=gsm8k.jsonl
    python -m workloads.convert data_path=hotpot.json output_path=hotpot.jsonl shape=documents
    python -m workloads.convert data_path=multiverse-1k.json output_path=m.jsonl shape=paths chat=true
    python -m workloads.convert --inspect FILE

The kind of source is detected from the first record of each file, unless `source` is given:
    messages     {"messages": [{"role", "content"}]}, the OpenAI format
    sharegpt     {"conversations": [{"from", "value"}]}
    alpaca       {"instruction", "input", "output"}, or Dolly's {"instruction", "context", "response"}
    pairs        {"prompt", "response" or "completion" or "output"}, {"question", "answer" or "response"},
                 {"query", "response"} or {"input", "output"}: texts, or lists of turns
    preference   {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} as turns that begin alike
    completions  {"prompt", "messages", "instruction" or "question", "completions" or "responses"}, or
                 {"prompt", "answers"}: a list of answers to one prompt
    reasoning    a question, its reasoning and its answer, under the keys of Multiverse-1K or ThreadWeaver
    squad        articles with paragraphs and their questions, or rows with context, question and answers
    hotpotqa     rows with titles and sentences as context, question and answer
    text         .txt files, or one column of CSV or other records, split into chunks
Files are .json, .jsonl, .ndjson, .csv, .tsv or .txt, each also with .gz or .zst, .parquet, or .arrow. A
folder is read file by file. Conversations are rendered with the chat template of base_model, and so are
alpaca, pairs, reasoning, preference and completions with chat=true. A passage becomes main and its questions
become branches; the answers of completions become branches, and so do those of a preference, the chosen one
first. Bad records are reported on stderr and skipped, and keys that have no effect are counted.

Two shapes are trees, in which a segment reads all branches (reduce):
    shape=documents  squad, hotpotqa: every document is a branch, the question follows in the reduce
    shape=paths      the tagged paths of an answer (<Parallel>, with <Path> of Multiverse or <Thread> of
                     ThreadWeaver) are branches, and what follows them is the reduce
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from pydantic import Field, model_validator

from parallelmind import cli
from parallelmind.config import ModelConfig, OutputPath
from parallelmind.data.convert.converter import Converter
from parallelmind.data.convert.readers import SOURCE_SUFFIXES, read_dataset
from parallelmind.data.convert.settings import ConvertSettings
from parallelmind.data.convert.source_records import BadRecord, ParallelRecord
from parallelmind.data.files import find_files
from parallelmind.errors import UserError, translate_write_errors
from parallelmind.outputs import check_output
from parallelmind.storage import atomic_file
from workloads.data.read_position import ReadPosition

if TYPE_CHECKING:  # a model library takes seconds to import
    from transformers import PreTrainedTokenizerBase

_MAX_REPORTED = 10  # bad records
_OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz")


class ConvertConfig(ConvertSettings):
    """Configuration of one conversion."""

    data_path: str | None = Field(
        None, description="source files: a file, folder, glob or URL, or several separated by commas"
    )
    dataset: str | None = Field(None, description="instead of data_path, a data set of the Hugging Face hub")
    subset: str | None = Field(None, description="dataset: its configuration, if it has several")
    split: str = Field("train", min_length=1, description="dataset: its split")
    output_path: OutputPath = Field(min_length=1, description="parallel JSONL to write: .jsonl or .jsonl.gz")
    strict: bool = Field(False, description="stop at the first bad source record instead of skipping it")
    base_model: str = Field(
        "smollm2-135m",
        min_length=1,
        description="model that provides the tokenizer and the chat template, where they are needed",
    )
    trust_remote_code: bool = Field(False, description="allow a hub model's tokenizer to run its own code")

    @model_validator(mode="after")
    def _check_source_and_output(self) -> Self:
        given = [name for name in ("data_path", "dataset") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'data_path'}: give exactly one of data_path=… and dataset=…"
            )
        if not self.output_path.endswith(_OUTPUT_SUFFIXES):
            raise ValueError(
                f"output_path={self.output_path}: training would not find it; "
                f"end it in {' or '.join(_OUTPUT_SUFFIXES)}"
            )
        return self

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        from parallelmind.model.base_model import load_tokenizer

        return load_tokenizer(
            ModelConfig(base_model=self.base_model, trust_remote_code=self.trust_remote_code)
        )


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError for anything that the user can correct."""
    if "--inspect" in argv:
        from workloads.data.inspect import main as inspect

        return inspect([item for item in argv if item != "--inspect"])
    if cli.wants_help(argv):
        return cli.print_help(__doc__ or "", ConvertConfig)
    return print(Conversion(cli.parse(ConvertConfig, argv)).run())


class Conversion:
    """Converts source records to one file of parallel JSONL; reports, counts and skips bad records."""

    def __init__(self, config: ConvertConfig) -> None:
        self._config = config
        self._converter = Converter(config, config.load_tokenizer)
        self._written = self._branches = self._bad = 0

    def run(self) -> str:
        """Write the file and return the counts in one line. After a UserError the output is unchanged."""
        output = self._config.output_path
        files = self._files()
        results, position = self._results(files), ReadPosition(files)
        with (
            translate_write_errors("output_path", output),
            atomic_file(Path(output)) as file,
            cli.progress("converting", position.total or None) as report_progress,
        ):
            for result in results:
                report_progress(position.num_bytes(), self._counts)
                if isinstance(result, BadRecord):
                    self._report(result)
                else:
                    self._write(result, file)
            if self._bad > _MAX_REPORTED:
                print(f"… and {self._bad - _MAX_REPORTED} more bad records", file=sys.stderr)
            self._report_keys()
            if not self._written:
                raise UserError(
                    f"{self._source}: gives no record ({self._counts()}); check the source, or set source=…"
                )
        return self._counts()

    @property
    def _source(self) -> str:
        config = self._config
        return f"dataset={config.dataset}" if config.dataset else f"data_path={config.data_path}"

    def _files(self) -> list[str]:
        """The source files; none of a data set of the hub."""
        if self._config.dataset:
            return []
        files = find_files(self._config.data_path or "", suffixes=SOURCE_SUFFIXES)
        check_output(self._config.output_path, "output_path", data_path=files)
        return files

    def _results(self, files: Sequence[str]) -> Iterable[ParallelRecord | BadRecord]:
        config = self._config
        if config.dataset:
            records = read_dataset(config.dataset, config.subset, config.split)
            return self._converter.convert_records(records)
        if len(files) == 1:
            return self._converter.convert_file(files[0])
        return chain.from_iterable(map(self._convert_one_of_many, files))

    def _convert_one_of_many(self, file: str) -> Iterable[ParallelRecord | BadRecord]:
        """The results of a file. One that is no source at all counts as a bad record beside the others."""
        try:
            return self._converter.convert_file(file)
        except UserError as error:
            return [BadRecord(file, str(error))]

    def _write(self, record: dict[str, Any], file: TextIO) -> None:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._written += 1
        self._branches += _count_branches(record) or 1  # a record without branches is one itself

    def _report(self, bad: BadRecord) -> None:
        if self._config.strict:
            raise UserError(
                f"{self._source}: {bad}; correct the record, or set strict=false to skip bad records"
            )
        self._bad += 1
        if self._bad <= _MAX_REPORTED:
            print(f"skipped: {bad}", file=sys.stderr)

    def _report_keys(self) -> None:
        """Print what of the source has no effect, and which of `columns` no record has."""
        if unused := self._converter.unused.most_common():
            keys = (f"{key} ({count:,} record{'s' * (count > 1)})" for key, count in unused)
            print(f"not used: {', '.join(keys)}", file=sys.stderr)
        if count := self._converter.flat_blocks:
            records = f"{count:,} record{'s' * (count > 1)}"
            print(f"shape=flat: <Parallel> blocks of {records} stay text; set shape=paths", file=sys.stderr)
        if missing := sorted(self._converter.columns.unseen):
            print(f"columns: no record has the key {', '.join(missing)}", file=sys.stderr)

    def _counts(self) -> str:
        counts = (
            f"{self._converter.records_read} records in, {self._written} records out, "
            f"{self._branches} branches, {self._bad} bad"
        )
        unanswered = self._converter.unanswered
        return f"{counts}, {unanswered} questions without an answer skipped" if unanswered else counts


def _count_branches(segment: dict[str, Any]) -> int:
    """Number of branches in a record or segment, at every level."""
    branches = segment.get("branches", [])
    reduce = [segment["reduce"]] if "reduce" in segment else []
    return len(branches) + sum(map(_count_branches, [*branches, *reduce]))
