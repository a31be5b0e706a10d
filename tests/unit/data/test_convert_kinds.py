"""What records of instructions, pairs and preferences teach is used, and keys without effect are counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from converting import TOKENIZER, bad_reason, convert

from parallelmind.config import DataConfig
from parallelmind.data.convert.converter import Converter
from parallelmind.data.convert.settings import ConvertSettings
from parallelmind.data.convert.source_records import SourceRecord
from parallelmind.data.record_parser import parse_value
from parallelmind.data.tokenise import tokenise
from parallelmind.errors import UserError
from parallelmind.layout import Tokens


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ALPACA = {"instruction": "and there?", "input": "", "output": "it rains"}
HISTORY = {"history": [["who", "it"]]}
TOOL = {"name": "weather", "description": "of a city"}


def samples(record: Any) -> Tokens:
    (tokenised,) = tokenise([parse_value(record)], TOKENIZER, DataConfig(data_path="-"))
    assert tokenised.tokens is not None
    return tokenised.tokens


@pytest.mark.parametrize(
    ("beside", "earlier"),
    [
        ({}, []),
        (HISTORY, [user("who"), assistant("it")]),
        ({"system": "Be brief."}, [SYSTEM]),
        ({"system_prompt": "Be brief.", **HISTORY}, [SYSTEM, user("who"), assistant("it")]),
        ({"system": "", "history": []}, []),
        ({"system": None, "history": None}, []),
        ({"system": "", "history": '[["who", "it"]]'}, [user("who"), assistant("it")]),
    ],
)
def test_history_and_system_are_earlier_turns(beside: dict[str, Any], earlier: list[Any]) -> None:
    expected = convert([{"messages": [*earlier, user("and there?"), assistant("it rains")]}])
    for values in (ALPACA, {"prompt": "and there?", "completion": "it rains"}):
        assert convert([{**values, **beside}], chat=True) == expected


def test_history_and_system_of_an_instruction_stand_in_the_text() -> None:
    (record,) = convert([{**ALPACA, **HISTORY, "system": "Be brief."}])
    expected = (
        "Be brief.\n\n### Instruction:\nwho\n\n### Response:\nit\n\n"
        "### Instruction:\nand there?\n\n### Response:\n"
    )
    assert record == {"prompt": expected, "completion": "it rains"}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            {"prompt": "who", "completion": "it", "system": "Be brief."},
            "has a system text, which only a chat",
        ),
        ({"question": "who", "answer": "it", **HISTORY}, "has a history, which only a chat template"),
        ({**ALPACA, "tools": [TOOL]}, "has tools, which only a chat template renders; set chat=true"),
        ({**ALPACA, "history": "who"}, "history is not JSON"),
        ({**ALPACA, "history": '"who"'}, "history is not a list of pairs"),
        ({"prompt": "who", "chosen": "it", "rejected": "it"}, "no difference between chosen and rejected"),
        ({**ALPACA, "history": [["who"]]}, "history is not a list of pairs"),
        ({**ALPACA, "history": [["who", ""]]}, "history[0][1] is empty"),
        ({**ALPACA, "context": 3}, "context is not text"),
        ({"chosen": "a", "rejected": "b"}, "has texts under chosen and rejected, and no prompt"),
        (
            {"chosen": [user("who")], "rejected": [user("who"), assistant("it")]},
            "no difference between",
        ),
        (
            {"prompt": [user("who")], "chosen": [user("in"), assistant("it")], "rejected": "no"},
            "another user turn",
        ),
    ],
)
def test_reason_of_a_bad_record(value: dict[str, Any], reason: str) -> None:
    assert reason in bad_reason(value)


def test_dolly_is_an_instruction_with_a_context() -> None:
    dolly = {"instruction": "Say who.", "context": "in", "response": "it"}
    alpaca = {"instruction": "Say who.", "input": "in", "output": "it"}
    assert convert([dolly]) == convert([alpaca])
    assert convert([dolly], chat=True) == convert([alpaca], chat=True)


def test_pairs_by_other_names() -> None:
    question = convert([{"question": "who?", "answer": "it"}])
    assert convert([{"query": "who?", "response": "it"}]) == question
    assert convert([{"question": "who?", "response": "it"}]) == question
    assert convert([{"input": "who ", "output": " it"}]) == [{"prompt": "who ", "completion": " it"}]


def test_prompt_and_completion_may_be_turns() -> None:
    conversation = [SYSTEM, user("who"), assistant("it"), user("and there?"), assistant("it rains")]
    value = {"prompt": conversation[:-1], "completion": conversation[-1:]}
    assert convert([value]) == convert([{"messages": conversation}])
    assert convert([value], each_turn=True) == convert([{"messages": conversation}])


def test_all_answers_of_a_completion_are_targets() -> None:
    turns = [assistant("it"), user("and there?"), assistant("they")]
    value = {"prompt": [user("who"), assistant("no one"), user("who?")], "completion": turns}
    (record,) = convert([value])
    tokens = samples(record)
    assert TOKENIZER.decode(tokens.ids[tokens.targets]) == "it</s>they</s>"
    assert len(convert([value], each_turn=True)) == 2


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": [user("who")], "completion": [assistant("it")]},
        {"prompt": [user("who")], "chosen": [assistant("it")], "rejected": [assistant("they")]},
        {"chosen": [user("who"), assistant("it")], "rejected": [user("who"), assistant("they")]},
        {"conversations": [{"from": "human", "value": "who", "id": 1}, {"from": "gpt", "value": "it"}]},
    ],
)
def test_turns_may_be_json_text(value: dict[str, Any]) -> None:
    written = {key: json.dumps(item) for key, item in value.items()}
    assert convert([written]) == convert([value])
    assert unused([written]) == unused([value])


@pytest.mark.parametrize("text", ["[1, 2]", '[{"name": "f"}]', "[x", "[]"])
def test_json_that_holds_no_turns_is_a_text(text: str) -> None:
    assert convert([{"prompt": "who", "completion": text}]) == [{"prompt": "who", "completion": text}]


@pytest.mark.parametrize(
    ("value", "others"),
    [
        ({"conversations": [user("who"), assistant("it")]}, ["messages", "prompt", "chosen", "rejected"]),
        ({"prompt": "who", "completion": "it"}, ["chosen", "rejected", "messages", "branches"]),
        (ALPACA, ["messages", "conversations", "response", "history", "system", "tools"]),
    ],
)
def test_a_key_without_a_value_indicates_no_kind(value: dict[str, Any], others: list[str]) -> None:
    assert convert([{**dict.fromkeys(others), **value}]) == convert([value])


def test_main_is_not_left_out() -> None:
    with pytest.raises(UserError, match="is parallel JSONL .*main, prompt, completion.*; train on it"):
        convert([{"main": "passage", "prompt": " who", "completion": " it"}])


@pytest.mark.parametrize("prompt", ["who", "谁住在里面"])
def test_a_prompt_without_spaces_is_not_divided(prompt: str) -> None:
    (record,) = convert([{"prompt": prompt, "chosen": " it", "rejected": " they"}])
    assert record == {
        "main": "",
        "branches": [{"prompt": prompt, "completion": answer} for answer in (" it", " they")],
    }


def test_preference_of_texts_is_one_record_with_two_branches() -> None:
    branches = [{"prompt": " in it?", "completion": " a"}, {"prompt": " in it?", "completion": " b"}]
    value = {"prompt": "who lives in it?", "chosen": " a", "rejected": " b"}
    assert convert([value]) == [
        {"main": "who lives in", "branches": [{**branch, "prompt": " it?"} for branch in branches]}
    ]
    (record,) = convert([{"question": "who?", "chosen": "a", "rejected": "b"}])
    assert record == {
        "main": " Question: who?",
        "branches": [{"prompt": "\nAnswer:", "completion": text} for text in (" a", " b")],
    }
    (record,) = convert([{"instruction": "who", "input": "in", "chosen": "a", "rejected": "b"}])
    assert isinstance(record, dict)
    assert record["main"].endswith("### Input:\nin\n\n###")


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "who", "chosen": "it", "rejected": "they"},
        {"prompt": [user("who")], "chosen": [assistant("it")], "rejected": [assistant("they")]},
        {"prompt": "who", "chosen": assistant("it"), "rejected": assistant("they")},
        {
            "prompt": "who",
            "chosen": [user("who"), assistant("it")],
            "rejected": [user("who"), assistant("they")],
        },
        {"chosen": [user("who"), assistant("it")], "rejected": [user("who"), assistant("they")]},
        {
            "conversations": [{"from": "human", "value": "who"}],
            "chosen": {"from": "gpt", "value": "it"},
            "rejected": {"from": "gpt", "value": "they"},
        },
        {"instruction": "who", "input": "", "chosen": "it", "rejected": "they"},
    ],
)
def test_preference_of_turns_has_the_tokens_of_both_conversations(value: dict[str, Any]) -> None:
    (record,) = convert([value], chat=True)
    tokens = samples(record)
    main, *branches = tokens.split()
    assert len(branches) == 2
    masks = [tokens.targets[len(main) :][: len(branches[0])], tokens.targets[len(main) + len(branches[0]) :]]
    for answer, branch, mask in zip(("it", "they"), branches, masks, strict=True):
        (expected,) = convert([{"messages": [user("who"), assistant(answer)]}])
        alone = samples(expected)
        assert [*main, *branch] == alone.ids.tolist()
        assert [False] * len(main) + mask.tolist() == alone.targets.tolist()


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "who lives in it?", "completions": [" a", " b", " a"]},
        {"prompt": "who lives in it?", "responses": [" a", " b", " a"]},
        {"prompt": "who lives in it?", "answers": [" a", " b", " a"], "id": 3},
        {"prompt": "who lives in it?", "completions": '[" a", " b", " a"]'},
        {
            "prompt": "who lives in it?",
            "answers": [{"answer": text, "rank": 1} for text in (" a", " b", " a")],
        },
    ],
)
def test_all_completions_of_a_prompt_are_branches_of_one_record(value: dict[str, Any]) -> None:
    branches = [{"prompt": " it?", "completion": text} for text in (" a", " b", " a")]
    assert convert([value]) == [{"main": "who lives in", "branches": branches}]


def test_completions_of_a_question_and_of_an_instruction() -> None:
    (record,) = convert([{"question": "who?", "completions": ["a"]}])
    branches = [{"prompt": "\nAnswer:", "completion": " a"}]
    assert record == {"main": " Question: who?", "branches": branches}
    (record,) = convert([{"instruction": "who", "input": "in", "responses": ["a", "b"]}])
    (pair,) = convert([{"instruction": "who", "input": "in", "chosen": "a", "rejected": "b"}])
    assert record == pair


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "who", "completions": ["it", "they", "no one"]},
        {"prompt": [user("who")], "completions": ["it", "they", "no one"]},
        {"messages": [user("who")], "responses": [[assistant("it")], assistant("they"), "no one"]},
        {"messages": [user("who")], "completions": [[user("who"), assistant("it")], "they", "no one"]},
        {"conversations": [{"from": "human", "value": "who"}], "completions": ["it", "they", "no one"]},
        {"question": "who", "responses": ["it", "they", "no one"]},
    ],
)
def test_completions_that_are_rendered_have_the_tokens_of_their_conversations(value: Any) -> None:
    (record,) = convert([value], chat=True)
    tokens = samples(record)
    main, *branches = tokens.split()
    ends = [len(main)]
    for answer, branch in zip(("it", "they", "no one"), branches, strict=True):
        (expected,) = convert([{"messages": [user("who"), assistant(answer)]}])
        alone = samples(expected)
        ends.append(ends[-1] + len(branch))
        assert [*main, *branch] == alone.ids.tolist()
        assert tokens.targets[ends[-2] : ends[-1]].tolist() == alone.targets[len(main) :].tolist()


def test_assistant_turns_of_the_prompt_of_completions_are_no_targets() -> None:
    prompt = [user("who"), assistant("it"), user("and there?")]
    (record,) = convert([{"messages": prompt, "completions": ["it", "it rains"], **HISTORY}])
    tokens = samples(record)
    assert TOKENIZER.decode(tokens.ids[tokens.targets]) == "it</s>it rains</s>"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": "who", "completions": []}, "completions is not a list of answers"),
        ({"prompt": "who", "completions": "it"}, "completions is not JSON"),
        ({"prompt": "who", "completions": [{"rank": 1}]}, "completions[0][0] has the role None"),
        ({"prompt": "who", "completions": {"a": 1}}, "completions is not a list of answers"),
        ({"prompt": "who", "completions": ["it", " "]}, "completions[1] is empty"),
        ({"prompt": "who", "completions": ["it", 3]}, "has no list of turns under completions[1]"),
        (
            {"messages": [user("who"), assistant("it")], "completions": ["they"]},
            "completions[0] follows an assistant turn; remove that turn, or set source=messages",
        ),
    ],
)
def test_reason_of_bad_completions(value: dict[str, Any], reason: str) -> None:
    assert reason in bad_reason(value)
    good = {"prompt": "who", "completions": ["it"]}
    _, record = convert([value, good], source="completions")
    assert [record] == convert([good])


def test_turns_in_which_a_preference_differs_are_targets() -> None:
    shared, ends = (
        [user("who"), assistant("it")],
        ([assistant("a"), user("b"), assistant("c")], [assistant("d")]),
    )
    chosen, rejected = ([*shared, user("and?"), *end] for end in ends)
    (record,) = convert([{"chosen": chosen, "rejected": rejected}])
    tokens = samples(record)
    assert TOKENIZER.decode(tokens.ids[tokens.targets]) == "a</s>c</s>d</s>"


def unused(values: list[Any], **settings: Any) -> dict[str, int]:
    converter = Converter(ConvertSettings.model_validate(settings), lambda: TOKENIZER)
    list(converter.convert_records(SourceRecord("0", value) for value in values))
    return dict(converter.unused)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "a", "response": "b", "id": 1, "n": None}, {"id"}),
        ({"prompt": "a", "response": "b", "output": "c"}, {"output"}),
        ({**ALPACA, **HISTORY, "system": "s", "source": "x"}, {"source"}),
        ({"messages": [{**user("a"), "id": 1}, assistant("b")], "source": "x"}, {"messages[].id", "source"}),
        ({"context": "a", "question": "b", "answers": {"text": ["c"], "answer_start": [0]}, "id": 1}, {"id"}),
        (
            {
                "title": "t",
                "paragraphs": [{"context": "a", "qas": [{"question": "b", "answer": "c", "id": 1}]}],
            },
            {"title", "paragraphs[].qas[].id"},
        ),
        ({"text": "a", "url": "b"}, {"url"}),
        ({"prompt": "a", "completions": [{"response": "b", "model": "m"}]}, {"completions[].model"}),
        (
            {
                "prompt": "a",
                "chosen": [assistant("b")],
                "rejected": [assistant("c")],
                "messages": [],
                "score": 1,
            },
            {"messages", "score"},
        ),
    ],
)
def test_keys_that_no_conversion_reads_are_counted(value: dict[str, Any], expected: set[str]) -> None:
    assert unused([value, value]) == dict.fromkeys(expected, 2)


def test_columns_are_renamed() -> None:
    expected = convert([{"prompt": "who ", "completion": "it"}])
    columns = {"prompt": "q", "completion": "a"}
    assert convert([{"q": "who ", "a": "it"}], columns=columns) == expected
    value = {"q": "who ", "a": "it", "prompt": "another", "id": 1}
    assert convert([value], columns=columns) == expected
    assert unused([value], columns=columns) == {"prompt of the source": 1, "id": 1}
    turns = [{"speaker": "user", "utterance": "who"}, {"speaker": "assistant", "utterance": "it"}]
    renamed = {"messages": "dialog", "role": "speaker", "content": "utterance"}
    assert convert([{"dialog": turns}], columns=renamed) == convert(
        [{"messages": [user("who"), assistant("it")]}]
    )


def test_the_chosen_answer_alone_is_a_completion() -> None:
    value = {"prompt": "who ", "chosen": "it", "rejected": "they"}
    assert convert([value], columns={"completion": "chosen"}) == [{"prompt": "who ", "completion": "it"}]


def test_a_chosen_conversation_alone_follows_its_prompt() -> None:
    """As in UltraFeedback, where it begins with the prompt's turns."""
    asked, answered = [user("who")], [assistant("it")]
    expected = convert([{"prompt": asked, "completion": answered}])
    columns = {"completion": "chosen"}
    for prompt in (asked, "who"):
        value = {"prompt": prompt, "chosen": [*asked, *answered], "rejected": [*asked, assistant("they")]}
        assert convert([value], columns=columns) == expected
    assert "nothing but the prompt" in bad_reason({"prompt": asked, "completion": asked})


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "who", "completion": str([assistant("it")])},
        {"prompt": str([user("who")]), "chosen": "it", "rejected": "they"},
        {"context": "a text", "question": "who", "answers": str({"text": ["it"], "answer_start": [1]})},
        {"context": "a text", "question": "who", "answers": "{'text': array(['it'], dtype=object)}"},
    ],
)
def test_lists_as_python_writes_them_are_no_text(value: dict[str, Any]) -> None:
    """pandas writes a column of lists to CSV like this."""
    assert "as Python writes them; write the file as JSON or Parquet" in bad_reason(value)


def test_titles_with_sentences_may_be_json_text() -> None:
    asked = {"question": "who", "answer": "it"}
    for context in ([["a", ["b. ", "c."]]], {"title": ["a"], "sentences": [["b. ", "c."]]}):
        assert convert([{**asked, "context": json.dumps(context)}]) == convert(
            [{**asked, "context": context}]
        )
    assert convert([{**asked, "context": "[a] b"}])[0]["main"].startswith("[a] b")


def test_mistakes_in_columns_are_told() -> None:
    with pytest.raises(ValueError, match=r"columns.promt=q: .* has the key promt \(did you mean prompt\?\)"):
        ConvertSettings(columns={"promt": "q"})
    with pytest.raises(UserError, match="cannot detect .* or columns="):
        convert([{"q": "who"}], columns={"prompt": "q"})
    converter = Converter(ConvertSettings(columns={"system": "sys", "prompt": "q"}), lambda: TOKENIZER)
    list(converter.convert_records([SourceRecord("0", {"q": "who", "response": "it"})]))
    assert converter.columns.unseen == {"sys"}


@pytest.mark.parametrize("label", [False, "false", "False"])
def test_an_answer_that_is_not_desirable_is_no_target(label: object) -> None:
    """KTO data. With other keys, or another value, `label` is no judgement of the answer."""
    pair = {"prompt": "who", "completion": "it"}
    assert bad_reason({**pair, "label": label}) == "label=false: its answer is not one to learn"
    turns = {"prompt": [user("who")], "completion": [assistant("it")]}
    assert "label=false" in bad_reason({**turns, "label": label})
    expected = convert([pair])
    assert convert([{**pair, "label": True}, {**pair, "label": "positive"}]) == expected * 2


def test_labels_are_not_told_as_unused_where_they_are_used() -> None:
    pair = {"prompt": "who", "completion": "it"}
    assert unused([{**pair, "label": True}]) == {}
    assert unused([{**pair, "label": 2}]) == {"label": 1}
