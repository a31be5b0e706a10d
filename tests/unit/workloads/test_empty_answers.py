"""Branches that the model ends without any text: the reason, and the form of a prompt that works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import parallelmind as pm
from workloads import chat
from workloads.common.empty_answers import ended_at_once
from workloads.generate import prompts as generating
from workloads.generate.config import GenerateConfig

END = 2  # id of the end-of-text token


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    sample = {"main": "Ada paints. " * 20, "branches": [{"text": " Question: Who?\nAnswer:"}]}
    (tmp_path / "parallelmind.json").write_text(json.dumps({"extra": {"samples": [sample]}}))
    return str(tmp_path)


def test_the_reason_shows_a_prompt_of_the_training_data(adapter: str) -> None:
    line = ended_at_once("branch 2", adapter)
    assert line.startswith(
        "branch 2: no text; the model began with an end-of-text token; give prompts the form"
    )
    assert line.endswith('prompts=[" Question: Who?\\nAnswer:"]')
    assert " … " in line
    assert len(line) < 300
    assert "\n" not in line


def test_the_reason_needs_no_adapter_and_no_sample(tmp_path: Path) -> None:
    assert ended_at_once("reduce", str(tmp_path)).endswith("; give prompts the form of the training data")
    assert ended_at_once("answer", None).endswith("end the prompt in another way, or set ignore_eos=true")
    assert "texts of stop" in ended_at_once("answer", None, has_stops=True)


def test_generate_names_the_empty_branches(
    adapter: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [pm.Event(0, " Ada", 5), pm.Event(1, "", END, "stop"), pm.Event(0, "", END, "stop")]
    monkeypatch.setattr(pm, "stream", lambda *_, **__: iter(events))
    config = GenerateConfig(prompts=["who", "where"])
    monkeypatch.setitem(config.__dict__, "model", _Model(adapter))
    generating.generate_from_prompts(config)
    out, err = capsys.readouterr()
    assert json.loads(out)["outputs"] == [" Ada", ""]
    assert [line.partition(";")[0] for line in err.splitlines()[:-1]] == ["branch 2: no text"]


def test_chat_says_why_an_answer_is_empty(
    adapter: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = chat.Conversation(None, None, chat.ChatSamplingConfig(), "Ada paints.", adapter)
    events = {
        1: [pm.Event(0, "", END, "stop")],
        2: [pm.Event(0, "", END, "stop"), pm.Event(1, " b", 5, "length")],
    }
    monkeypatch.setattr(pm, "stream", lambda _, __, sample, **___: iter(events[len(sample.branches)]))
    monkeypatch.setattr(chat, "linearized", lambda stream: stream)
    conversation.answer(["who"])
    assert "answer: no text" in capsys.readouterr().out
    conversation.answer(["who", "where"])
    out = capsys.readouterr().out
    assert "[2] b" in out
    assert out.count("no text") == out.count("branch 1: no text") == 1


class _Model:
    """Stands in for the model of a command."""

    def __init__(self, lora_path: str) -> None:
        self.lora_path = lora_path

    def load(self) -> tuple[None, None]:
        return None, None
