"""`workloads.generate` and `workloads.chat` on a tiny model, as a user calls them."""

from __future__ import annotations

import sys
from functools import partial

import pytest
from generating import rows
from tiny import save_tiny, tiny_tokenizer

from parallelmind import cli
from parallelmind.errors import UserError, UserNotice
from parallelmind.evaluation import tiny_models as model_tiny
from workloads import chat
from workloads.generate import command as generate
from workloads.generate.config import GenerateConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


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
    assert row["finish_reasons"] == ["length", "length"]


def test_prompts_go_to_a_file_that_is_not_there_yet(tiny, tmp_path):
    given = [
        f"base_model={tiny}",
        "prompt=who",
        "max_new_tokens=3",
        f"output_path={tmp_path / 'new' / 'out.jsonl'}",
    ]
    generate.main(given)
    (row,) = rows((tmp_path / "new" / "out.jsonl").read_text())
    assert row["branches"] == ["who"]
    with pytest.raises(UserError, match="out.jsonl: is there already"):
        generate.main(given)


def test_a_model_without_branches_is_refused_with_a_remedy_that_works(tmp_path, capsys):
    model_tiny.tiny_model("jamba", vocab_size=300).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    given = [
        f"base_model={tmp_path}",
        "main=the passage",
        "prompts=[who, where]",
        "max_new_tokens=3",
        "ignore_eos=true",
    ]
    with pytest.raises(UserError, match="recurrent .*patch_rope=false"):
        generate.main(given)
    with pytest.warns(UserNotice, match="jamba keeps a recurrent"):
        generate.main([*given, "patch_rope=false"])
    assert len(rows(capsys.readouterr().out)[0]["outputs"]) == 2


def test_a_notice_is_one_line_without_a_place_in_the_code():
    assert cli._one_line(UserNotice("mind this"), UserNotice, "file.py", 3) == "note: mind this\n"
    assert "file.py:3" in cli._one_line(UserWarning("theirs"), UserWarning, "file.py", 3, line="code")


def test_progress_without_a_terminal_tells_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_SECONDS_BETWEEN_LINES", -1)
    with cli.progress("working", 4) as tell:
        for done in range(3):
            tell(done, partial("{} done".format, done))
    assert capsys.readouterr().err == "0 done\n1 done, 0:00:00 left\n2 done, 0:00:00 left\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give exactly one of prompt"),
        (["prompt=a", "data_path=b"], "prompt and data_path: give exactly one"),
        (["data_path=none.jsonl"], "data_path=none.jsonl: no such file"),
        (
            ["prompt=a", "num_workers=2"],
            "num_workers=2: workers read data_path .*; give data_path and output_path",
        ),
        (["data_path=a", "num_workers=2"], "give data_path and output_path"),
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


@pytest.mark.parametrize(
    "value", ["1: why?", "a=b ${x} \\${y} \\n", '"quoted"', "12", "[a", "#", "", "~", "line\ntwo"]
)
def test_text_fields_take_text_as_it_is(value):
    assert cli.parse(GenerateConfig, ["prompt=a", f"main={value}"]).main == value


def test_null_switches_an_optional_text_off():
    assert cli.parse(GenerateConfig, ["prompt=a", "lora_path=null", "--top_k=3"]).lora_path is None


def test_help_shows_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    generate.main(["--help"])
    out = capsys.readouterr().out
    for name, field in GenerateConfig.model_fields.items():
        assert any(
            line.split()[0] == name and field.description in line
            for line in out.splitlines()
            if line.startswith("  ")
        )


def test_chat_without_a_terminal(tiny, monkeypatch, capsys):
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
    monkeypatch.setattr(
        chat.Chat, "sample_of", lambda self, prompt: seen.append(original(self, prompt)) or seen[-1]
    )
    chat.main([f"base_model={tiny}", "max_new_tokens=3"])
    assert seen[0].branches[0] == "<s>user\nwho</s>\n<s>assistant\n"
    assert seen[1].branches[0].startswith(seen[0].branches[0])
    assert seen[1].branches[0].endswith("<s>user\nwhere</s>\n<s>assistant\n")
