"""`workloads.generate` with prompts on the command line, its fields and its error messages."""

from __future__ import annotations

import pytest
from forking import MARKERS, ScriptedEngine
from generating import parse_rows
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from parallelmind import cli
from parallelmind.config import RopeConfig
from parallelmind.errors import UserError, UserNotice
from parallelmind.evaluation.tiny_models import tiny_model
from parallelmind.model.fork_markers import set_fork_markers
from parallelmind.model.patch import patch
from workloads.common.inference_config import InferenceModelConfig
from workloads.generate.command import main as generate
from workloads.generate.config import GenerateConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_single_prompt_prints_plain_text(tiny, capsys):
    generate([f"base_model={tiny}", "prompt=who: 1, 2", "max_new_tokens=4", "ignore_eos=true"])
    out, err = capsys.readouterr()
    assert out.strip()
    assert "4 tokens in" in err
    assert "tokens/s" in err


def test_prompts_are_branches_of_one_sample(tiny, capsys):
    generate([f"base_model={tiny}", "main=the passage", "prompts=[who, where is]", "max_new_tokens=3"])
    (row,) = parse_rows(capsys.readouterr().out)
    assert (row["main"], row["branches"], len(row["outputs"])) == ("the passage", ["who", "where is"], 2)
    assert row["finish_reasons"] == ["length", "length"]


def test_prompts_are_written_to_a_new_file_only(tiny, tmp_path):
    output = tmp_path / "new" / "out.jsonl"
    argv = [f"base_model={tiny}", "prompt=who", "max_new_tokens=3", f"output_path={output}"]
    generate(argv)
    (row,) = parse_rows(output.read_text())
    assert row["branches"] == ["who"]
    with pytest.raises(UserError, match="out.jsonl: already exists"):
        generate(argv)


def test_unsupported_model_is_refused_with_a_remedy_that_works(tmp_path, capsys):
    tiny_model("jamba", vocab_size=300).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    argv = [
        f"base_model={tmp_path}",
        "main=the passage",
        "prompts=[who, where]",
        "max_new_tokens=3",
        "ignore_eos=true",
    ]
    with pytest.raises(UserError, match="recurrent .*patch_rope=false"):
        generate(argv)
    with pytest.warns(UserNotice, match="jamba keeps a recurrent"):
        generate([*argv, "patch_rope=false"])
    assert len(parse_rows(capsys.readouterr().out)[0]["outputs"]) == 2


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
        (["hello"], "hello: unknown argument"),
    ],
)
def test_wrong_arguments_give_a_one_line_error(argv, message):
    with pytest.raises(UserError, match=message) as error:
        generate(argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", ["1: why?", "a=b ${x} \\${y} \\n", '"quoted"', "12", "[a", "#", "", "~", "line\ntwo"]
)
def test_text_fields_take_their_value_verbatim(value):
    assert cli.parse(GenerateConfig, ["prompt=a", f"main={value}"]).input.main == value


def test_null_unsets_an_optional_text_field():
    assert cli.parse(GenerateConfig, ["prompt=a", "lora_path=null", "--top_k=3"]).model.lora_path is None


def test_help_shows_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    generate(["--help"])
    out = capsys.readouterr().out
    for name, field in GenerateConfig.flat_fields().items():
        assert any(
            line.split()[0] == name and field.description in line
            for line in out.splitlines()
            if line.startswith("  ")
        )


def test_an_adapter_that_forks_by_itself_writes_one_text(tiny, monkeypatch, capsys):
    model = tiny_llama()
    patch(model, RopeConfig(rope_2d_ratio=0, visibility="isolated"))
    set_fork_markers(model, MARKERS)
    texts = {0: "see {one|two}", 1: " is</s>", 2: " are in</s>", 3: " so</s>"}
    monkeypatch.setattr(ScriptedEngine, "script", staticmethod(lambda seed, branch: texts.get(branch, "")))
    monkeypatch.setattr("parallelmind.engine.generate.Engine", ScriptedEngine)
    monkeypatch.setattr(InferenceModelConfig, "load", lambda self, **_: (model, tiny_tokenizer()))
    for field, end in (("prompt=Who", "\n"), ("prompts=[Who]", "")):
        generate([f"base_model={tiny}", field, "max_new_tokens=60"])
        out = capsys.readouterr().out
        assert "one is" in out
        assert out.endswith(end)
