"""Answers with tagged parallel paths become trees whose segments, joined, are the answer again."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from chat_templates import CHAT_KINDS, chat_tokenizer
from converting import TOKENIZER, bad_reason, convert, convert_one, segment_texts
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from parallelmind.data.convert.chat import ChatRenderer
from parallelmind.data.convert.converter import Converter
from parallelmind.data.convert.settings import ConvertSettings
from parallelmind.data.convert.source_records import SourceRecord
from parallelmind.data.convert.tagged_paths import tree_of_answer
from parallelmind.data.records import MAX_DEPTH, RecordError
from parallelmind.errors import UserError

MULTIVERSE = (
    "Two cases.\n<Parallel>\n<Goal>\n<Outline>1: even</Outline>\n<Outline>2: odd</Outline>\n</Goal>\n"
    "<Path>\n1: It is 4.\n</Path>\n<Path>\n2: It is 5.\n</Path>\n"
    "<Conclusion>\nBoth hold.\n</Conclusion>\n</Parallel>\nSo 9."
)
THREADWEAVER = (
    "<think>\nSplit it.\n<Parallel>\n<Outlines>\n<Outline>1: left</Outline>\n<Outline>2: right</Outline>\n"
    "</Outlines>\n<Thread>\n1: 2 * 3 = 6\n</Thread><Thread>\n2: 4 * 5 = 20\n</Thread>\n</Parallel>\n"
    "6 * 20 = 120\n</think>\n120"
)
TOO_DEEP = f"has more than {MAX_DEPTH - 1} <Parallel> blocks in or after one another"


def pair(answer: str, prompt: str = "what is it") -> dict[str, str]:
    return {"prompt": prompt, "response": answer}


def test_a_multiverse_trace_is_a_tree() -> None:
    assert convert_one(pair(MULTIVERSE), shape="paths") == {
        "main": "what is",
        "branches": [
            {
                "prompt": " it",
                "completion": MULTIVERSE[: MULTIVERSE.index("</Goal>")] + "</Goal>",
                "branches": [
                    {"prompt": "\n<Path>\n1:", "completion": " It is 4.\n</Path>"},
                    {"prompt": "\n<Path>\n2:", "completion": " It is 5.\n</Path>"},
                ],
                "reduce": {
                    "prompt": "\n<Conclusion>",
                    "completion": "\nBoth hold.\n</Conclusion>\n</Parallel>\nSo 9.",
                },
            }
        ],
    }


def test_a_threadweaver_trace_is_a_tree_that_goes_on_after_its_block() -> None:
    tree = tree_of_answer("<s>", THREADWEAVER)
    assert tree is not None
    assert [branch["prompt"] for branch in tree["branches"]] == ["\n<Thread>\n1:", "<Thread>\n2:"]
    assert tree["completion"].endswith("</Outlines>")
    assert tree["reduce"] == {
        "prompt": "\n</Parallel>",
        "completion": "\n6 * 20 = 120\n</think>\n120",
    }


def test_numbers_of_paths_stand_in_their_prompts_and_other_numbers_do_not() -> None:
    paths = ["<Path>1.2: a</Path>", "<Path> 3. b</Path>", "<Path>3.5 m</Path>", "<Path>c</Path>"]
    tree = tree_of_answer("", f"<Parallel>{''.join(paths)}</Parallel>")
    assert tree is not None
    assert [branch["prompt"] for branch in tree["branches"]] == [
        "<Path>1.2:",
        "<Path> 3.",
        "<Path>",
        "<Path>",
    ]


def test_a_reduce_without_further_text_is_a_text() -> None:
    tree = tree_of_answer("", "<Parallel><Path>1: a</Path></Parallel>")
    assert tree is not None
    assert tree["reduce"] == {"text": "</Parallel>"}


@dataclass
class Trace:
    """A random trace and its tree as nested lists: a segment is (branches, reduce), a leaf is None."""

    rng: random.Random
    text: list[str] = field(default_factory=list)

    def say(self) -> None:
        words = ["\n", " ", "a = 3", "où 😀", "<b>", "2:", "</think>", "Path>", "< Path>", ""]
        self.text.append("".join(self.rng.choices(words, k=self.rng.randint(0, 4))))

    def blank(self) -> None:
        self.text.append(self.rng.choice(["", " ", "\n", "\n\n\t"]))

    def segment(self, blocks: int, depth: int) -> Any:
        """Write text with this number of blocks one after another."""
        self.say()
        if not blocks:
            return None
        outline, path = self.rng.choice([("Goal", "Path"), ("Outlines", "Thread"), ("", "Path")])
        self.text.append("<Parallel>")
        if outline:
            self.text.append(f"\n<{outline}><Outline>1: x</Outline> goal</{outline}>")
        branches = []
        for number in range(self.rng.randint(1, 3)):
            self.blank()
            self.text.append(f"<{path}>" + self.rng.choice(["", f"\n{number}:", f" {number}. "]))
            branches.append(self.segment(self.rng.randint(0, 2) if depth else 0, depth - 1))
            self.text.append(f"</{path}>")
        self.blank()
        reduce = self._reduce(blocks - 1, depth)
        return branches, reduce

    def _reduce(self, blocks: int, depth: int) -> Any:
        if self.rng.random() < 0.5:
            self.text.append("<Conclusion>")
            self.say()
            self.text.append("</Conclusion>")
            self.say()
        self.text.append("</Parallel>")
        return self.segment(blocks, depth)


def shape_of(segment: dict[str, Any]) -> Any:
    if "branches" not in segment:
        return None
    return [shape_of(branch) for branch in segment["branches"]], shape_of(segment["reduce"])


def random_trace(seed: int) -> tuple[str, Any]:
    trace = Trace(random.Random(seed))
    shape = trace.segment(blocks=trace.rng.randint(1, 3), depth=2)
    return "".join(trace.text), shape


@pytest.mark.parametrize("seed", range(100))
def test_joined_segments_are_the_answer(seed: int) -> None:
    answer, shape = random_trace(seed)
    tree = tree_of_answer(" it", answer)
    assert tree is not None
    assert "".join(segment_texts(tree)) == " it" + answer
    assert shape_of(tree) == shape
    for prompt in prompts(tree):
        assert re.fullmatch(r" it|\s*</?(Path|Thread|Conclusion|Parallel)>(\s*\d+[:.])?", prompt)


def prompts(segment: dict[str, Any]) -> list[str]:
    """The prompts of a segment and of what follows it; a text without completion counts as prompt."""
    followers = [*segment.get("branches", []), *([segment["reduce"]] if "reduce" in segment else [])]
    return [segment.get("prompt", segment.get("text", "")), *(p for s in followers for p in prompts(s))]


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_that_lacks_a_tag_is_refused(seed: int) -> None:
    answer, _ = random_trace(seed)
    for tag in re.finditer(r"</?(Parallel|Goal|Outlines|Path|Thread|Conclusion)>", answer):
        with pytest.raises(RecordError, match="^has "):
            tree_of_answer(" it", answer[: tag.start()] + answer[tag.end() :])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("a <Path>1: x</Path>", "has <Path> outside of <Parallel>, at character 2 of the answer"),
        ("<Parallel><Goal>g</Goal></Parallel>", "has </Parallel> of a block without <Path> or <Thread>, at"),
        ("<Parallel><Path>1: x", "has a <Path> that is not closed"),
        ("<Parallel><Path>1: x</Path>", "has a <Parallel> that is not closed"),
        ("<Parallel><Path>x</Thread></Parallel>", "has </Thread> in <Path>, at character 17"),
        ("<Parallel><Goal><Path>x</Path></Goal></Parallel>", "has <Path> in <Goal>"),
        ("<Parallel><Path>x</Path>y<Path>z</Path></Parallel>", "text that belongs to no path"),
        ("<Parallel><Path>x</Path>y</Parallel>", "text that belongs to no path"),
        ("<Parallel><Path>x</Path><Goal></Goal></Parallel>", "where another path, <Conclusion> or </Par"),
        (
            "<Parallel><Path>x</Path><Conclusion></Conclusion><Path>y</Path></Parallel>",
            "has <Path> after the paths of its <Parallel> have ended",
        ),
        ("</Parallel>", "has </Parallel> that closes nothing"),
        ("<Parallel><Path>" * 5000, TOO_DEEP),  # more than Python's limit of recursion
    ],
)
def test_reason_of_an_answer_with_wrong_tags(answer: str, reason: str) -> None:
    value, good = pair(answer), pair(MULTIVERSE)
    assert reason in bad_reason(value, shape="paths")
    _, record = convert([value, good], shape="paths")
    assert [record] == convert([good], shape="paths")


@pytest.mark.parametrize(
    "join", ["<Parallel><Path>x</Path></Parallel>", "<Parallel><Path>x\0</Path></Parallel>"]
)
def test_the_deepest_answer_is_a_record(join: str) -> None:
    before, _, after = join.partition("\0")
    blocks = before * (MAX_DEPTH - 1) + after * (MAX_DEPTH - 1)
    assert convert_one(pair(blocks), shape="paths")["branches"]
    assert TOO_DEEP in bad_reason(pair(before + blocks + after), shape="paths")


def test_a_block_after_a_deep_block_counts_alone() -> None:
    deep = "<Parallel><Path>" * 10 + "</Path></Parallel>" * 10
    assert tree_of_answer("", deep * 3) is not None


@pytest.mark.parametrize("answer", ["It is 4.", "<think>a</think><Conclusion>4</Conclusion>"])
def test_an_answer_without_a_block_is_converted_as_without_the_shape(answer: str) -> None:
    assert convert([pair(answer)], shape="paths") == convert([pair(answer)])
    assert convert([pair(answer)], shape="paths", chat=True) == convert([pair(answer)], chat=True)


def test_the_tags_of_a_prompt_are_text() -> None:
    value = pair(MULTIVERSE, prompt="Write <Parallel> and <Path> as in <Path>1: x</Path> please.")
    record = convert_one(value, shape="paths")
    assert record["main"] + "".join(segment_texts(record["branches"][0])) == value["prompt"] + MULTIVERSE


def conversation(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("kind", CHAT_KINDS)
@pytest.mark.filterwarnings("ignore:.*begins an answer with:parallelmind.errors.UserNotice")
def test_a_rendered_answer_follows_the_generation_prompt(kind: str) -> None:
    tokenizer, messages = chat_tokenizer(kind), conversation(MULTIVERSE)
    answer = ChatRenderer(tokenizer).last_answer(messages)
    main = answer.main if isinstance(answer.main, str) else tokenizer.decode(answer.main["input_ids"])
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert main + answer.header + answer.text == rendered.rstrip()
    tree = tree_of_answer(answer.header, answer.text)
    assert tree is not None
    assert len(tree["branches"]) == 2
    assert answer.header.strip()
    if not CHAT_KINDS[kind].reopens:
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        assert main + answer.header == prompt


def test_a_conversation_is_a_tree_whose_main_is_its_context() -> None:
    messages = conversation(MULTIVERSE)
    record = convert_one({"messages": messages}, shape="paths")
    assert record["main"] == "<s>user\nwhat is it</s>\n"
    (top,) = record["branches"]
    assert top["prompt"] == "<s>assistant\n"
    assert top["reduce"]["completion"].endswith("So 9.</s>")
    assert convert_one(pair(MULTIVERSE), shape="paths", chat=True) == record
    turns = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": MULTIVERSE}]
    assert convert_one({"conversations": turns}, shape="paths") == record


def test_the_last_answer_alone_becomes_a_tree() -> None:
    messages = [*conversation(THREADWEAVER), *conversation(MULTIVERSE)]
    record = convert_one({"messages": messages}, shape="paths")
    assert THREADWEAVER in record["main"]
    assert len(record["branches"][0]["branches"]) == 2
    for name in ("each_turn", "all_turns"):
        with pytest.raises(ValueError, match=f"shape=paths {name}=true: only the last answer"):
            ConvertSettings.model_validate({"shape": "paths", name: True})


def test_a_main_that_would_get_a_bos_of_the_tokenizer_is_given_as_ids() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    main = ChatRenderer(tokenizer).last_answer(conversation(MULTIVERSE)).main
    assert isinstance(main, dict)
    assert tokenizer.decode(main["input_ids"]) == "user what is it</s>"
    assert main["input_ids"] == tokenizer("user what is it</s>", add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("reasoning", "answer"),
    [
        ("deepseek_thinking_trajectory_parallel", "deepseek_attempt"),
        ("response_reasoning", "response_content"),
    ],
)
def test_published_records_are_read_by_their_keys(reasoning: str, answer: str) -> None:
    value = {"question": "what is it", reasoning: MULTIVERSE, answer: "9", "solution": "9"}
    text = f"<think>\n{MULTIVERSE}\n</think>\n\n9"
    assert convert([value], shape="paths", chat=True) == convert([pair(text)], shape="paths", chat=True)
    assert convert([value], chat=True) == convert([pair(text)], chat=True)
    assert convert([value], shape="paths") == convert(
        [{"question": "what is it", "answer": text}], shape="paths"
    )
    assert bad_reason({**value, answer: " "}) == f"{answer} is empty"


def test_records_with_blocks_that_stay_text_are_counted() -> None:
    values = [pair(MULTIVERSE), pair("no block"), pair(THREADWEAVER)]
    for settings, count in (({}, 2), ({"chat": True}, 2), ({"shape": "paths"}, 0)):
        converter = Converter(ConvertSettings.model_validate(settings), lambda: TOKENIZER)
        assert len(list(converter.convert_records(SourceRecord("0", value) for value in values))) == 3
        assert converter.flat_blocks == count


def test_a_shape_that_a_source_does_not_have_is_refused() -> None:
    with pytest.raises(
        UserError, match="shape=documents: 0 is of the kind pairs, which has no documents; rem"
    ):
        convert([pair(MULTIVERSE)], shape="documents")
    with pytest.raises(UserError, match="shape=paths: 0 is of the kind text, which has no paths"):
        convert([{"text": MULTIVERSE}], shape="paths")
