"""Convert source records of every kind to records of parallel JSONL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import chain
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from parallelmind.data.convert.chat import ChatRenderer
from parallelmind.data.convert.chunks import chunk_text
from parallelmind.data.convert.conversation import parse_messages, parse_tools
from parallelmind.data.convert.passages import (
    PassageQuestion,
    QuestionTemplates,
    expand_articles,
    group_by_passage,
    passage_questions,
)
from parallelmind.data.convert.readers import read_records, read_text, source_suffix
from parallelmind.data.convert.settings import PAIR_KEYS, ConvertSettings, Source, detect_source
from parallelmind.data.convert.source_records import (
    BadRecord,
    ParallelRecord,
    SourceRecord,
    convert_each,
    required_text,
)
from parallelmind.data.records import RecordError
from parallelmind.errors import UserError

Results = Iterator[ParallelRecord | BadRecord]


class Converter:
    """Converts files or streams of source records.

    load_tokenizer: called at most once, and only if a kind of source needs a tokenizer. records_read: number
    of source records so far (paragraphs of SQuAD, files of plain text). unanswered: number of questions left
    out because the source has no answer.
    """

    def __init__(
        self, settings: ConvertSettings, load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    ) -> None:
        self.settings = settings
        self.records_read = self.unanswered = 0
        self._load_tokenizer = load_tokenizer
        self._templates = QuestionTemplates(settings.question_template, settings.answer_template)

    def convert_file(self, file: str) -> Results:
        """The results of one file, in order. Raises UserError for an unknown kind of file or record."""
        if source_suffix(file) != ".txt":
            return self.convert_records(read_records(file))
        if self.settings.source not in ("auto", "text"):
            raise UserError(
                f"source={self.settings.source}: {file} is plain text; "
                "set source=text, or give JSON, JSONL or CSV"
            )
        self.records_read += 1
        return chunk_text(read_text(file), self._tokenizer, self.settings.chunk_tokens)

    def convert_records(self, records: Iterable[SourceRecord | BadRecord]) -> Results:
        """The results of records of one kind, in order. Raises UserError if the kind cannot be detected."""
        first, records = _peek_first(iter(records))
        return self._convert(self._source(first), records) if first else self._count(records)

    def _source(self, first: SourceRecord) -> Source:
        if self.settings.source != "auto":
            return self.settings.source
        source = detect_source(first.value, self.settings.text_column)
        if source is None:
            is_object = isinstance(first.value, dict)
            keys = f"the keys {', '.join(map(str, first.value))}" if is_object else "not an object"
            raise UserError(
                f"source=auto: cannot detect the kind of {first.location} ({keys}); "
                f"set source to one of {', '.join(get_args(Source))}"
            )
        return source

    def _convert(self, source: Source, records: Iterator[SourceRecord | BadRecord]) -> Results:
        if source in ("squad", "hotpotqa"):  # one code path reads both forms of a context
            parse = partial(passage_questions, templates=self._templates)
            questions = convert_each(self._count(expand_articles(records)), parse)
            return group_by_passage(self._drop_unanswered(questions), self.settings.grouping == "global")
        converters: dict[Source, Callable[[Any], Iterable[ParallelRecord]]] = {
            "messages": partial(self._conversation, "messages"),
            "sharegpt": partial(self._conversation, "conversations"),
            "alpaca": self._instruction,
            "pairs": self._pair,
            "text": self._text,
        }
        return convert_each(self._count(records), converters[source])

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

    def _conversation(self, key: str, value: Any) -> Iterator[ParallelRecord]:
        messages = parse_messages(value, key)
        return self._chat.records(messages, self.settings.each_turn, parse_tools(value))

    def _instruction(self, value: Any) -> Iterable[ParallelRecord]:
        """The published Alpaca prompt without its preamble, which is the same for every task."""
        instruction, output = required_text(value, "instruction"), required_text(value, "output")
        task_input = required_text(value, "input") if str(value.get("input") or "").strip() else ""
        if self.settings.chat:
            return self._chat_exchange(
                f"{instruction}\n\n{task_input}" if task_input else instruction, output
            )
        sections = {
            "Instruction": instruction,
            **({"Input": task_input} if task_input else {}),
            "Response": "",
        }
        prompt = "\n\n".join(f"### {name}:\n{text}" for name, text in sections.items())
        return [{"prompt": prompt, "completion": output}]

    def _pair(self, value: Any) -> Iterable[ParallelRecord]:
        """Prompt and response unchanged; question and answer through the templates, which add the spaces."""
        keys = set(value.keys()) if isinstance(value, dict) else set()
        pair = next((pair for pair in PAIR_KEYS if set(pair) <= keys), None)
        if pair is None:
            raise RecordError(f"has none of {', '.join(' + '.join(pair) for pair in PAIR_KEYS)}")
        prompt, completion = (required_text(value, key) for key in pair)
        if self.settings.chat:
            return self._chat_exchange(prompt, completion)
        if pair == ("question", "answer"):
            return [self._templates.branch(prompt, completion)]
        return [{"prompt": prompt, "completion": completion}]

    def _text(self, value: Any) -> Iterator[Any]:
        text = required_text(value, self.settings.text_column)
        return chunk_text([text], self._tokenizer, self.settings.chunk_tokens)

    def _chat_exchange(self, question: str, answer: str) -> Iterator[ParallelRecord]:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._chat.records(messages, each_turn=False)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load_tokenizer()

    @cached_property
    def _chat(self) -> ChatRenderer:
        return ChatRenderer(self._tokenizer)


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
