"""`workloads.chat` with a tiny model and scripted input."""

from __future__ import annotations

import random

import pytest
from chat_checks import chat_ids, random_conversation
from chat_templates import CHAT_KINDS, chat_tokenizer
from tiny import save_tiny, tiny_tokenizer

from parallelmind.engine.tokenization import tokenize_sample
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
    first, second = (tiny_tokenizer().decode(sample.branches[0]) for sample in samples)
    assert first == "<s>user\nwho</s>\n<s>assistant\n"
    assert second.startswith(first)
    assert second.endswith("<s>user\nwhere</s>\n<s>assistant\n")


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_chat_reads_the_token_ids_of_the_chat_template(kind):
    tokenizer = chat_tokenizer(kind)
    conversation = chat.Conversation(None, tokenizer, {})
    conversation.messages = random_conversation(kind, random.Random(kind), 2)
    messages = [*conversation.messages, {"role": "user", "content": " who?"}]
    sample = tokenize_sample(tokenizer, conversation.to_sample(" who?"))
    assert sample.ids.tolist() == chat_ids(tokenizer, messages, add_generation_prompt=True)
