"""Which kind of source a record is, and from each kind to parallel JSONL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from parallelmind.config import FrozenConfig
from parallelmind.data.convert.chat import Chat, messages_at
from parallelmind.data.convert.chunks import chunks
from parallelmind.data.convert.items import Bad, Converted, Item, each, text_at
from parallelmind.data.convert.passages import Asked, Wording, asked, grouped, paragraphs
from parallelmind.data.convert.reading import ending, read_items, read_text
from parallelmind.data.records import RecordError
from parallelmind.errors import UserError

Source = Literal["messages", "sharegpt", "alpaca", "pairs", "squad", "hotpotqa", "text"]
Found = Iterator[Converted | Bad]

_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("prompt", "output"), ("question", "answer"))
_CHOICES = ", ".join(get_args(Source))


class ConvertSettings(FrozenConfig):
    """How source records are read and what they become."""

    source: Literal[Source, "auto"] = Field(
        "auto", description="kind of the source records; auto: see the first one"
    )
    chat: bool = Field(
        False, description="alpaca, pairs: write them through the chat template, as user and assistant"
    )
    each_turn: bool = Field(
        False, description="messages, sharegpt: a record for each assistant turn, not the last one alone"
    )
    question_template: str = Field(
        " Question: {question}\nAnswer:", description="prompt of a branch that asks a question"
    )
    answer_template: str = Field(" {answer}", description="completion of a branch that asks a question")
    grouping: Literal["consecutive", "global"] = Field(
        "consecutive",
        description="squad, hotpotqa: questions to a main that follow one another, or all (held in memory)",
    )
    text_column: str = Field("text", min_length=1, description="text: column or key that holds the text")
    chunk_tokens: int = Field(512, ge=64, description="text: longest chunk, in tokens, BOS and EOS included")

    @model_validator(mode="after")
    def _templates(self) -> Self:
        for name in ("question", "answer"):
            if f"{{{name}}}" not in getattr(self, f"{name}_template"):
                raise ValueError(
                    f"{name}_template={getattr(self, f'{name}_template')!r}: has no {{{name}}}; write it in"
                )
        return self


def recognise(value: Any, text_column: str) -> Source | None:
    """The kind of source that a record looks like, or None."""
    if not isinstance(value, dict) or value.keys() & {"branches", "answer_offset", "input_ids"}:
        return None  # the latter are parallel JSONL already
    if "messages" in value:
        return "messages"
    if "conversations" in value:
        return "sharegpt"
    if value.keys() & {"paragraphs", "qas"}:
        return "squad"
    if {"context", "question"} <= value.keys():
        return "squad" if isinstance(value["context"], str) else "hotpotqa"
    if {"instruction", "output"} <= value.keys():
        return "alpaca"
    if any(set(pair) <= value.keys() for pair in _PAIRS):
        return "pairs"
    return "text" if text_column in value else None


class Converter:
    """Files of source records to records of parallel JSONL.

    tokenizer: called once, and only where a kind of source needs one. read: source records so far (of SQuAD,
    paragraphs; of plain text, files). unanswered: questions left out because the source has no answer to
    them.
    """

    def __init__(self, settings: ConvertSettings, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        self.settings = settings
        self.read = self.unanswered = 0
        self._load = tokenizer
        self._wording = Wording(settings.question_template, settings.answer_template)

    def file(self, file: str) -> Found:
        """What one file becomes, in its order. Raises UserError for a kind of file or record that is not
        known.
        """
        if ending(file) != ".txt":
            return self.items(read_items(file))
        if self.settings.source not in ("auto", "text"):
            raise UserError(
                f"source={self.settings.source}: {file} is plain text; set source=text, or give JSON, JSONL or CSV"
            )
        self.read += 1
        return chunks(read_text(file), self._tokenizer, self.settings.chunk_tokens)

    def items(self, items: Iterable[Item | Bad]) -> Found:
        """What records of one kind become, in their order. Raises UserError where the first does not show the
        kind.
        """
        first, items = _first(iter(items))
        return self._converted(self._source(first), items) if first else self._counted(items)

    def _source(self, first: Item) -> Source:
        if self.settings.source != "auto":
            return self.settings.source
        source = recognise(first.value, self.settings.text_column)
        if source is None:
            keys = (
                f"the keys {', '.join(map(str, first.value))}"
                if isinstance(first.value, dict)
                else "no object"
            )
            raise UserError(
                f"source=auto: cannot tell what {first.place} is ({keys}); set source to one of {_CHOICES}"
            )
        return source

    def _converted(self, source: Source, items: Iterator[Item | Bad]) -> Found:
        if source in ("squad", "hotpotqa"):  # they differ in how a context is written, and either is read
            found = each(self._counted(paragraphs(items)), partial(asked, wording=self._wording))
            return grouped(self._answered(found), self.settings.grouping == "global")
        makers: dict[Source, Callable[[Any], Iterable[Converted]]] = {
            "messages": partial(self._conversation, "messages"),
            "sharegpt": partial(self._conversation, "conversations"),
            "alpaca": self._instruction,
            "pairs": self._pair,
            "text": self._text,
        }
        return each(self._counted(items), makers[source])

    def _counted(self, items: Iterable[Item | Bad]) -> Iterator[Any]:
        for item in items:
            self.read += 1
            yield item

    def _answered(self, found: Iterable[Asked | Bad]) -> Iterator[Asked | Bad]:
        for item in found:
            if isinstance(item, Asked) and item.branch is None:
                self.unanswered += 1
            else:
                yield item

    def _conversation(self, key: str, value: Any) -> Iterator[Converted]:
        return self._chat.records(messages_at(value, key), self.settings.each_turn)

    def _instruction(self, value: Any) -> Iterable[Converted]:
        """The published Alpaca prompt without its preamble, which says nothing about the task."""
        instruction, output = text_at(value, "instruction"), text_at(value, "output")
        given = text_at(value, "input") if str(value.get("input") or "").strip() else ""
        if self.settings.chat:
            return self._exchange(f"{instruction}\n\n{given}" if given else instruction, output)
        parts = {"Instruction": instruction, **({"Input": given} if given else {}), "Response": ""}
        return [
            {
                "prompt": "\n\n".join(f"### {name}:\n{text}" for name, text in parts.items()),
                "completion": output,
            }
        ]

    def _pair(self, value: Any) -> Iterable[Converted]:
        """Prompt and response as they are; a question and its answer, which bring no space between them, by
        the templates.
        """
        keys = value.keys() if isinstance(value, dict) else ()
        asks, answers = next((pair for pair in _PAIRS if set(pair) <= set(keys)), (None, None))
        if asks is None or answers is None:
            raise RecordError(f"has none of {', '.join(' + '.join(pair) for pair in _PAIRS)}")
        prompt, completion = text_at(value, asks), text_at(value, answers)
        if self.settings.chat:
            return self._exchange(prompt, completion)
        return [
            self._wording.pair(prompt, completion)
            if asks == "question"
            else {"prompt": prompt, "completion": completion}
        ]

    def _text(self, value: Any) -> Iterator[Any]:
        return chunks(
            [text_at(value, self.settings.text_column)], self._tokenizer, self.settings.chunk_tokens
        )

    def _exchange(self, question: str, answer: str) -> Iterator[Converted]:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._chat.records(messages, each_turn=False)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load()

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self._tokenizer)


def _first(items: Iterator[Item | Bad]) -> tuple[Item | None, Iterator[Item | Bad]]:
    """The first good record, and all of them again."""
    seen = []
    for item in items:
        seen.append(item)
        if isinstance(item, Item):
            return item, chain(seen, items)
    return None, iter(seen)
