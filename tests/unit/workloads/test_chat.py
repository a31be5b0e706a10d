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
    conversation = chat.Conversation(None, tokenizer, chat.ChatSamplingConfig())
    conversation.messages = random_conversation(kind, random.Random(kind), 2)
    messages = [*conversation.messages, {"role": "user", "content": " who?"}]
    sample = tokenize_sample(tokenizer, conversation.to_sample(" who?"))
    assert sample.ids.tolist() == chat_ids(tokenizer, messages, add_generation_prompt=True)


@pytest.fixture
def conversation():
    return chat.Conversation(None, tiny_tokenizer(), chat.ChatSamplingConfig())


def test_settings_change_and_are_shown(conversation, capsys):
    for line in ("/temperature 0.7", "/temperature", "/stop [END]", "/settings"):
        assert conversation.handle_line(line)
    assert conversation.sampling.temperature == 0.7
    assert conversation.sampling.stop == ["END"]
    out = capsys.readouterr().out
    assert out.startswith("temperature=0.7\ntemperature=0.7\nstop=")
    assert "max_new_tokens=256\n" in out


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/temprature 1", "error: /temprature: unknown command (did you mean /temperature?)"),
        ("/temperature -1", "error: temperature=-1.0: give 0 (greedy)"),
        ("/temperature warm", "error: temperature=warm: "),
    ],
)
def test_a_wrong_command_is_told_and_changes_nothing(conversation, capsys, line, error):
    before = conversation.sampling
    assert conversation.handle_line(line)
    assert capsys.readouterr().out.replace("\n", " ").startswith(error)
    assert conversation.sampling == before


def test_ctrl_c_at_the_prompt_discards_the_line(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "who", EOFError])

    def read(_):
        item = next(typed)
        if isinstance(item, str):
            return item
        raise item

    monkeypatch.setattr("builtins.input", read)
    assert list(chat.read_lines("> ")) == ["who"]
    assert "/quit leaves" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_alone(conversation, monkeypatch, capsys):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(chat.pm, "stream", interrupted)
    assert conversation.handle_line("who")
    assert "(stopped)" in capsys.readouterr().out
    assert conversation.messages == []


def test_lines_of_earlier_chats_are_kept(monkeypatch, tmp_path):
    import readline

    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    readline.clear_history()
    with chat.line_history():
        readline.add_history("who")
    readline.clear_history()
    with chat.line_history():
        assert readline.get_history_item(1) == "who"
    readline.clear_history()
