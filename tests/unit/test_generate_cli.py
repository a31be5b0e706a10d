"""`workloads.generate` and `workloads.chat` on a tiny model, as a user calls them."""

from __future__ import annotations

import json
import sys

import pytest
from tiny import save_tiny, tiny_tokenizer

from parallelmind.errors import Notice, UserError
from parallelmind.evaluation import tiny as model_tiny
from workloads import chat, cli, generate


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_one_prompt_is_answered_in_plain_text(tiny, capsys):
    generate.main([f"base_model={tiny}", "prompt=who: 1, 2", "max_new_tokens=4", "ignore_eos=true"])
    out, err = capsys.readouterr()
    assert out.strip()
    assert "4 tokens in" in err
    assert "tokens/s" in err


def test_prompts_are_branches_of_one_sample(tiny, capsys):
    generate.main([f"base_model={tiny}", "main=the passage", "prompts=[who, where is]", "max_new_tokens=3"])
    (row,) = rows(capsys.readouterr().out)
    assert (row["main"], row["branches"], len(row["outputs"])) == ("the passage", ["who", "where is"], 2)


def test_a_model_without_branches_is_refused_with_a_remedy_that_works(tmp_path, capsys):
    model_tiny.tiny_model("jamba", vocab_size=300).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    given = [f"base_model={tmp_path}", "main=the passage", "prompts=[who, where]", "max_new_tokens=3", "ignore_eos=true"]
    with pytest.raises(UserError, match="recurrent .*patch_rope=false"):
        generate.main(given)
    with pytest.warns(Notice, match="jamba keeps a recurrent"):
        generate.main([*given, "patch_rope=false"])
    assert len(rows(capsys.readouterr().out)[0]["outputs"]) == 2


def test_a_notice_is_one_line_without_a_place_in_the_code():
    assert cli._one_line(Notice("mind this"), Notice, "file.py", 3) == "note: mind this\n"
    assert "file.py:3" in cli._one_line(UserWarning("theirs"), UserWarning, "file.py", 3, line="code")


def test_bad_lines_are_reported_and_the_job_goes_on(tiny, tmp_path, capsys):
    data, out = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    data.write_text(
        '{"main": "the", "branches": [{"prompt": "who ", "completion": "lives"}, "in"]}\n'
        "{not json\n\n"
        '{"text": "the answer is in", "answer_offset": 2}\n'
        '{"branches": [{"prompt": "", "completion": "x"}]}\n'
    )
    generate.main([f"base_model={tiny}", f"data_path={data}", f"output_path={out}", "max_new_tokens=2"])
    first, second = rows(out.read_text())
    assert first["branches"] == ["who ", "in"]
    assert len(second["branches"][0]) == 2, "a text is continued from its answer offset"
    err = capsys.readouterr().err
    assert f"{data}:2: skipped: is not JSON" in err
    assert f"{data}:5: skipped: branches[0]: holds no token" in err
    assert "2 of 4 lines skipped" in err


def test_a_text_file_is_one_prompt_per_line(tiny, tmp_path, capsys):
    data = tmp_path / "in.txt"
    data.write_text("who\nwhere is\n")
    generate.main([f"base_model={tiny}", f"data_path={data}", "max_new_tokens=2"])
    assert [row["branches"] for row in rows(capsys.readouterr().out)] == [["who"], ["where is"]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give exactly one of prompt"),
        (["prompt=a", "data_path=b"], "prompt and data_path: give exactly one"),
        (["data_path=none.jsonl"], "data_path=none.jsonl: no such file"),
        (["prompt=a", "temperature=-1"], "temperature=-1.*: give 0"),
        (["prompt=a", "tempreature=1"], "did you mean temperature"),
        (["prompt=a", "lora_path=nowhere"], "nowhere"),
        (["prompt=a", "--verbose"], "there are no flags"),
        (["hello"], "hello: not understood"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError, match=message) as error:
        generate.main(argv)
    assert "\n" not in str(error.value)


def test_exit_codes(monkeypatch, capsys):
    def fail(argv):
        raise UserError("field=1: too low; give 2")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as stop:
        cli.run(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: field=1: too low; give 2\n"


@pytest.mark.parametrize("value", ["1: why?", "a=b ${x} \\${y} \\n", '"quoted"', "12", "[a", "#", "", "~", "line\ntwo"])
def test_text_fields_take_text_as_it_is(value):
    assert cli.parse(generate.GenerateConfig, ["prompt=a", f"main={value}"]).main == value


def test_null_switches_an_optional_text_off():
    assert cli.parse(generate.GenerateConfig, ["prompt=a", "lora_path=null", "--top_k=3"]).lora_path is None


def test_help_shows_every_field(capsys):
    generate.main(["--help"])
    out = capsys.readouterr().out
    for name, field in generate.GenerateConfig.model_fields.items():
        assert any(line.split()[0] == name and field.description in line for line in out.splitlines() if line.startswith("  "))


def test_chat_without_a_terminal(tiny, monkeypatch, capsys):
    lines = iter(["/help", "/main the passage", "who || where is", "/reset", "who", "x" * 5000, "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.main([f"base_model={tiny}", "max_new_tokens=3"])
    out = capsys.readouterr().out
    assert "/reset" in out
    assert "[1] " in out
    assert "[2] " in out
    assert "error: max_new_tokens=3" in out
    assert next(lines) == "never read"


def test_chat_keeps_the_conversation(tiny, monkeypatch):
    ends = iter(["who", "where"])

    def read(_):
        try:
            return next(ends)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    seen = []
    original = chat.Chat.sample_of
    monkeypatch.setattr(chat.Chat, "sample_of", lambda self, prompt: seen.append(original(self, prompt)) or seen[-1])
    chat.main([f"base_model={tiny}", "max_new_tokens=3"])
    assert seen[0].branches[0] == "<s>user\nwho</s>\n<s>assistant\n"
    assert seen[1].branches[0].startswith(seen[0].branches[0])
    assert seen[1].branches[0].endswith("<s>user\nwhere</s>\n<s>assistant\n")
