"""Convert one source record of a known kind. Questions about passages are converted in groups elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from parallelmind.data.convert.answers import (
    PREFERENCE_KEYS,
    answer_turns,
    check_preference,
    parse_answers,
    preference_turns,
    record_of_conversations,
    record_of_texts,
    split_prompt,
    turns_after,
)
from parallelmind.data.convert.chat import ChatRenderer
from parallelmind.data.convert.chunks import chunk_text
from parallelmind.data.convert.conversation import (
    Message,
    Tools,
    parse_messages,
    parse_tools,
    system_text,
    turns_of,
    with_system,
)
from parallelmind.data.convert.exchange import Exchange, exchange_turns, parse_exchange, parse_history
from parallelmind.data.convert.kinds import Kind, Source, find_kind, is_desirable, required_keys
from parallelmind.data.convert.passages import QuestionTemplates
from parallelmind.data.convert.settings import ConvertSettings
from parallelmind.data.convert.source_records import ParallelRecord, required_text
from parallelmind.data.convert.tagged_paths import has_block, tree_of_answer
from parallelmind.data.record_parser import parse_value
from parallelmind.data.records import RecordError
from parallelmind.data.tokenise import NO_LIMITS, tokenise
from parallelmind.layout import Tokens

if TYPE_CHECKING:  # a model library takes seconds to import
    from transformers import PreTrainedTokenizerBase

_QUESTION_KEYS = ("question", "query")  # their texts go through the templates, which add the spaces


class RecordConverter:
    """Converts records of one source.

    load_tokenizer: called at most once, and only if it is needed. flat_blocks: number of records so far in
    which parallel paths have stayed text, because the shape is flat.
    """

    def __init__(
        self, settings: ConvertSettings, load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    ) -> None:
        self._settings = settings
        self._load_tokenizer = load_tokenizer
        self.flat_blocks = 0
        self.templates = QuestionTemplates(settings.question_template, settings.answer_template)

    def convert(self, source: Source, value: Any) -> Iterable[Any]:
        """The records of parallel JSONL of one source record. Raises RecordError."""
        if not isinstance(value, dict):
            raise RecordError("is not a JSON object")
        kind = find_kind(value, source, self._settings.text_column)
        if kind is None:
            raise RecordError(f"has none of {', '.join(required_keys(source, self._settings.text_column))}")
        kind.check_turns(value)
        converters: dict[Source, Callable[[Kind, dict[str, Any]], Iterable[Any]]] = {
            "messages": self._conversation,
            "sharegpt": self._conversation,
            "preference": self._preference,
            "completions": self._completions,
            "reasoning": self._reasoning,
            "alpaca": self._exchange,
            "pairs": self._pair,
            "text": self._text,
        }
        return converters[source](kind, kind.with_turns(value))

    def split_text(self, pieces: Iterable[Any]) -> Iterator[Any]:
        """Chunks of a text that is given in pieces."""
        return chunk_text(pieces, self._tokenizer, self._settings.chunk_tokens)

    def _conversation(self, kind: Kind, value: dict[str, Any]) -> Iterable[ParallelRecord]:
        settings = self._settings
        messages, tools = parse_messages(value, kind.required[0]), parse_tools(value)
        return self._rendered(messages, tools, settings.each_turn, settings.all_turns)

    def _rendered(
        self, messages: list[Message], tools: Tools, each_turn: bool = False, all_turns: bool = False
    ) -> Iterable[ParallelRecord]:
        """The records of a conversation that is rendered with the chat template."""
        if self._settings.shape == "paths":
            answer = self._chat.last_answer(messages, tools)
            if tree := tree_of_answer(answer.header, answer.text):
                return [{"main": answer.main, "branches": [tree]}]
        self._note_block(*(turn["content"] for turn in messages if turn["role"] == "assistant"))
        return self._chat.records(messages, each_turn, tools, all_turns)

    def _note_block(self, *answers: str) -> None:
        self.flat_blocks += self._settings.shape == "flat" and any(map(has_block, answers))

    def _pair(self, kind: Kind, value: dict[str, Any]) -> Iterable[ParallelRecord]:
        """A pair of texts, or of turns, of which all answers in the completion are targets."""
        if is_desirable(value) is False:
            raise RecordError("label=false: its answer is not one to learn")
        if not any(isinstance(value[key], list | dict) for key in kind.required):
            return self._exchange(kind, value)
        prompt_key, completion_key = kind.required
        prompt = [{**turn, "train": False} for turn in turns_of(value[prompt_key], prompt_key, "user")]
        completion = turns_after(prompt, value[completion_key], completion_key)
        turns = [*exchange_turns(parse_history(value.get("history"))), *prompt, *completion]
        messages = with_system(turns, system_text(value))
        each_turn = self._settings.each_turn
        return self._rendered(messages, parse_tools(value), each_turn, all_turns=not each_turn)

    def _exchange(self, kind: Kind, value: dict[str, Any]) -> Iterable[ParallelRecord]:
        exchange = parse_exchange(value, *kind.required)
        if self._settings.chat:
            return self._rendered(exchange.messages(), exchange.tools)
        record = self._plain(kind.required[0], exchange)
        if self._settings.shape == "paths":
            main, beginning = split_prompt(record["prompt"])
            if tree := tree_of_answer(beginning, record["completion"]):
                return [{"main": main, "branches": [tree]}]
        self._note_block(exchange.response)
        return [record]

    def _reasoning(self, kind: Kind, value: dict[str, Any]) -> Iterable[ParallelRecord]:
        """A question whose answer is the reasoning, in the marks of reasoning models, and what follows it."""
        question_key, reasoning_key, answer_key = kind.required
        reasoning, answer = required_text(value, reasoning_key), required_text(value, answer_key)
        pair = Kind("pairs", (question_key, "response"), kind.keys)
        return self._exchange(pair, {**value, "response": f"<think>\n{reasoning}\n</think>\n\n{answer}"})

    def _plain(self, request_key: str, exchange: Exchange) -> ParallelRecord:
        """An exchange as prompt and completion without a chat template."""
        if request_key == "instruction":
            return {"prompt": exchange.alpaca_prompt(), "completion": exchange.response}
        exchange.check_plain()
        if request_key in _QUESTION_KEYS:
            return self.templates.branch(exchange.request, exchange.response)
        return {"prompt": exchange.request, "completion": exchange.response}

    def _preference(self, kind: Kind, value: dict[str, Any]) -> Iterable[ParallelRecord]:
        """Two answers as two branches. Texts are rendered only with chat=true, turns always."""
        prompt_key = kind.required[0] if len(kind.required) > len(PREFERENCE_KEYS) else None
        if all(isinstance(value[key], str) for key in kind.required) and not self._settings.chat:
            if prompt_key is None:
                raise RecordError("has texts under chosen and rejected, and no prompt")
            record = self._text_answers(prompt_key, value, PREFERENCE_KEYS)
            check_preference(*(branch["completion"] for branch in record["branches"]))
            return [record]
        prompt = self._prompt_turns(prompt_key, value, "chosen")
        return [self._turn_answers(preference_turns(value, prompt), parse_tools(value))]

    def _completions(self, kind: Kind, value: dict[str, Any]) -> Iterable[ParallelRecord]:
        """All answers to a prompt as branches. Texts are rendered only with chat=true, turns always."""
        prompt_key, answers_key = kind.required
        answers = parse_answers(value, answers_key)
        value = {**value, **answers}
        texts = (value[prompt_key], *answers.values())
        if all(isinstance(text, str) for text in texts) and not self._settings.chat:
            return [self._text_answers(prompt_key, value, answers)]
        prompt = self._prompt_turns(prompt_key, value, next(iter(answers)))
        return [self._turn_answers(answer_turns(value, prompt, answers), parse_tools(value))]

    def _text_answers(
        self, prompt_key: str, value: dict[str, Any], answer_keys: Iterable[str]
    ) -> ParallelRecord:
        """A record without a chat template whose branches are the answers under these keys."""
        exchanges = [parse_exchange(value, prompt_key, key) for key in answer_keys]
        records = [self._plain(prompt_key, exchange) for exchange in exchanges]
        return record_of_texts(records[0]["prompt"], [record["completion"] for record in records])

    def _turn_answers(self, conversations: list[list[Message]], tools: Tools) -> ParallelRecord:
        """A rendered record whose branches are the ends of these conversations."""
        return record_of_conversations([self._tokens(turns, tools) for turns in conversations])

    def _prompt_turns(self, prompt_key: str | None, value: dict[str, Any], answer_key: str) -> list[Message]:
        if prompt_key == "instruction":
            return turns_of(parse_exchange(value, prompt_key, answer_key).user_text, prompt_key, "user")
        return turns_of(value[prompt_key], prompt_key, "user") if prompt_key else []

    def _tokens(self, messages: list[Message], tools: Tools) -> Tokens:
        """A conversation as a sample of one branch, in which every turn that is to be learnt is a target."""
        (record,) = self._chat.records(messages, tools=tools, all_turns=True)
        (tokenised,) = tokenise([parse_value(record)], self._tokenizer, NO_LIMITS)
        if tokenised.tokens is None:
            raise RecordError("has no answer token that starts after the prompt")
        return tokenised.tokens

    def _text(self, kind: Kind, value: dict[str, Any]) -> Iterator[Any]:
        return self.split_text([required_text(value, kind.required[0])])

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load_tokenizer()

    @cached_property
    def _chat(self) -> ChatRenderer:
        return ChatRenderer(self._tokenizer)
