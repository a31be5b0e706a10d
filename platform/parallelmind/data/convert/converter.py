"""Convert files and streams of source records to records of parallel JSONL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, get_args

from parallelmind.data.convert.columns import Columns
from parallelmind.data.convert.documents import group_by_article, group_by_source
from parallelmind.data.convert.kinds import SHAPES, Source, find_kind, is_parallel, unused_keys
from parallelmind.data.convert.passages import (
    PassageQuestion,
    expand_articles,
    group_by_passage,
    passage_questions,
)
from parallelmind.data.convert.readers import read_records, read_text, source_suffix
from parallelmind.data.convert.record_converter import RecordConverter
from parallelmind.data.convert.settings import ConvertSettings
from parallelmind.data.convert.source_records import BadRecord, ParallelRecord, SourceRecord, convert_each
from parallelmind.errors import UserError

if TYPE_CHECKING:  # a model library takes seconds to import
    from transformers import PreTrainedTokenizerBase

Results = Iterator[ParallelRecord | BadRecord]


class Converter:
    """Converts files or streams of source records.

    load_tokenizer: called at most once, and only if a kind of source needs a tokenizer. records_read: number
    of source records so far (paragraphs of SQuAD, files of plain text). unanswered: number of questions left
    out because the source has no answer. unused: number of source records by each key that is not read.
    flat_blocks: number of records in which parallel paths have stayed text, because the shape is flat.
    """

    def __init__(
        self, settings: ConvertSettings, load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    ) -> None:
        self.settings = settings
        self.columns = Columns(settings.columns)
        self.records_read = self.unanswered = 0
        self.unused: Counter[str] = Counter()
        self._records = RecordConverter(settings, load_tokenizer)

    @property
    def flat_blocks(self) -> int:
        return self._records.flat_blocks

    def convert_file(self, file: str) -> Results:
        """The results of one file, in order. Raises UserError for an unknown kind of file or record."""
        if source_suffix(file) != ".txt":
            return self.convert_records(read_records(file, self.settings.encoding))
        if self.settings.source not in ("auto", "text"):
            raise UserError(
                f"source={self.settings.source}: {file} is plain text; "
                "set source=text, or give JSON, JSONL or CSV"
            )
        self._check_shape("text", file)
        self.records_read += 1
        return self._records.split_text(read_text(file, self.settings.encoding))

    def convert_records(self, records: Iterable[SourceRecord | BadRecord]) -> Results:
        """The results of records of one kind, in order. Raises UserError if the kind cannot be detected."""
        first, records = _peek_first(map(self.columns.rename, records))
        if first is None:
            return self._count(records)
        source = self._source(first)
        self._check_shape(source, first.location)
        return self._convert(source, records)

    def _check_shape(self, source: Source, location: str) -> None:
        """Raise UserError if the records of a source have nothing that the shape makes branches of."""
        shape = self.settings.shape
        if source not in SHAPES[shape]:
            raise UserError(
                f"shape={shape}: {location} is of the kind {source}, which has no {shape}; "
                f"remove shape, or set source to one of {', '.join(SHAPES[shape])}"
            )

    def _source(self, first: SourceRecord) -> Source:
        if self.settings.source != "auto":
            return self.settings.source
        kind = find_kind(first.value, "auto", self.settings.text_column)
        if kind is None:
            raise _undetected(first)
        return kind.source

    def _convert(self, source: Source, records: Iterator[SourceRecord | BadRecord]) -> Results:
        records = self._note_unused(source, records)
        if source in ("squad", "hotpotqa"):  # one code path reads both forms of a context
            parse = partial(passage_questions, templates=self._records.templates)
            questions = convert_each(self._count(expand_articles(records)), parse)
            answered, in_memory = self._drop_unanswered(questions), self.settings.grouping == "global"
            if self.settings.shape == "documents" and self.settings.distractors == "all":
                return group_by_source(answered, self.settings.documents)
            if self.settings.shape == "documents":
                return group_by_article(answered, in_memory, self.settings.documents)
            return group_by_passage(answered, in_memory)
        return convert_each(self._count(records), partial(self._records.convert, source))

    def _note_unused(
        self, source: Source, records: Iterable[SourceRecord | BadRecord]
    ) -> Iterator[SourceRecord | BadRecord]:
        """The records, with the keys counted that their kind does not read."""
        for record in records:
            if isinstance(record, SourceRecord):
                kind = find_kind(record.value, source, self.settings.text_column)
                unused = unused_keys(kind, record.value) if kind else set()
                self.unused.update(unused - {"title"} if self.settings.shape == "documents" else unused)
            yield record

    def _count(self, records: Iterable[SourceRecord | BadRecord]) -> Iterator[Any]:
        for record in records:
            self.records_read += 1
            yield record

    def _drop_unanswered(
        self, questions: Iterable[PassageQuestion | BadRecord]
    ) -> Iterator[PassageQuestion | BadRecord]:
        for question in questions:
            if isinstance(question, PassageQuestion) and question.branch is None:
                self.unanswered += 1
            else:
                yield question


def _undetected(first: SourceRecord) -> UserError:
    """The error for a first record that indicates no kind of source."""
    is_object = isinstance(first.value, dict)
    keys = f"the keys {', '.join(map(str, first.value))}" if is_object else "not an object"
    sources = f"set source to one of {', '.join(get_args(Source))}"
    if is_parallel(first.value):
        return UserError(
            f"source=auto: {first.location} is parallel JSONL ({keys}); train on it as it is, or {sources}"
        )
    return UserError(
        f"source=auto: cannot detect the kind of {first.location} ({keys}); "
        f"{sources}, or columns={{EXPECTED_KEY: SOURCE_KEY}}"
    )


def _peek_first(
    records: Iterator[SourceRecord | BadRecord],
) -> tuple[SourceRecord | None, Iterator[SourceRecord | BadRecord]]:
    """The first good record, and an iterator over all records."""
    consumed = []
    for record in records:
        consumed.append(record)
        if isinstance(record, SourceRecord):
            return record, chain(consumed, records)
    return None, iter(consumed)
