"""`workloads.chat` with a tiny model and scripted input."""

from __future__ import annotations

import pytest
from tiny import save_tiny

from workloads import chat


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_commands_and_prompts_without_a_terminal(tiny, monkeypatch, capsys):
    lines = iter(
        ["/help", "/main the passage", "who || where is", "/reset", "who", "x" * 5000, "/quit", "never read"]
    )
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.main([f"base_model={tiny}", "max_new_tokens=3"])
    out = capsys.readouterr().out
    assert "/reset" in out
    assert "[1] " in out
    assert "[2] " in out
    assert "error: max_new_tokens=3" in out
    assert next(lines) == "never read"


def test_single_prompts_continue_the_conversation(tiny, monkeypatch):
    prompts = iter(["who", "where"])

    def read_line(_):
        try:
            return next(prompts)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read_line)
    samples = []
    to_sample = chat.Conversation.to_sample
    monkeypatch.setattr(
        chat.Conversation,
        "to_sample",
        lambda self, prompt: samples.append(to_sample(self, prompt)) or samples[-1],
    )
    chat.main([f"base_model={tiny}", "max_new_tokens=3"])
    assert samples[0].branches[0] == "<s>user\nwho</s>\n<s>assistant\n"
    assert samples[1].branches[0].startswith(samples[0].branches[0])
    assert samples[1].branches[0].endswith("<s>user\nwhere</s>\n<s>assistant\n")
