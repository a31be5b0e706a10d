"""`workloads.generate` and `workloads.chat` on a tiny model, as a user calls them."""

from __future__ import annotations

import fcntl
import gzip
import json
import random
import sys
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import save_tiny, tiny_tokenizer

import parallelmind as pm
from parallelmind.errors import Notice, UserError
from parallelmind.evaluation import tiny as model_tiny
from parallelmind.model.manifest import MANIFEST
from workloads import chat, cli, generate, generate_batch, generate_input, generate_output

# Ends of texts at many different steps.
SAMPLING = {"max_new_tokens": 12, "stop": ["e", "o", "t"]}
WORDS = "the answer to a question is in that passage who what where 你好".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def records(count: int) -> list[dict]:
    """Samples with and without main, with one to three branches of very different lengths."""
    draw = random.Random(count)
    words = lambda least, most: " ".join(draw.choices(WORDS, k=draw.randint(least, most)))  # noqa: E731
    return [{"main": words(0, 9), "branches": [words(1, 30) for _ in range(draw.randint(1, 3))]} for _ in range(count)]


def save(path, values) -> None:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")


@pytest.fixture
def job(tiny, tmp_path):
    """A command over 30 samples and a bad line in `in.jsonl`, which can be given other fields; results in `out.jsonl`."""
    save(tmp_path / "in.jsonl", records(30))
    lines = (tmp_path / "in.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "in.jsonl").write_bytes(b"".join([*lines[:20], b"{bad\n", b"\n", *lines[20:]]))

    def run(**fields) -> bytes:
        stop = "stop=[{}]".format(",".join(SAMPLING["stop"]))
        given = {
            "base_model": tiny,
            "max_new_tokens": 12,
            "data_path": tmp_path / "in.jsonl",
            "output_path": tmp_path / "out.jsonl",
        }
        generate.main([stop, *(f"{name}={value}" for name, value in {**given, **fields}.items())])
        return (tmp_path / "out.jsonl").read_bytes()

    return run


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
    given = [f"base_model={tiny}", "prompt=who", "max_new_tokens=3", f"output_path={tmp_path / 'new' / 'out.jsonl'}"]
    generate.main(given)
    (row,) = rows((tmp_path / "new" / "out.jsonl").read_text())
    assert row["branches"] == ["who"]
    with pytest.raises(UserError, match="out.jsonl: is there already"):
        generate.main(given)


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
    assert (first["line"], second["line"]) == (1, 4)
    err = capsys.readouterr().err
    assert f"{data}:2: skipped: is not JSON" in err
    assert f"{data}:5: skipped: branches[0]: holds no token" in err
    assert "2 of 4 lines skipped" in err


@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_a_text_file_is_one_prompt_per_line(tiny, tmp_path, capsys, ending):
    data = tmp_path / f"in.{ending}"
    with (gzip.open if ending.endswith("gz") else open)(data, "wt", newline="") as file:
        file.write("who\r\n\nwhere is\n")
    generate.main([f"base_model={tiny}", f"data_path={data}", "max_new_tokens=2"])
    assert [(row["line"], row["branches"]) for row in rows(capsys.readouterr().out)] == [(1, ["who"]), (3, ["where is"])]


def test_rows_are_in_the_order_of_the_lines_and_say_what_each_sample_says_alone(job, tiny, monkeypatch):
    monkeypatch.setattr(generate_batch, "_IN_FLIGHT", 5)
    monkeypatch.setattr(generate_batch, "_AHEAD", 9)
    model, tokenizer = pm.load_model_with_lora(tiny)
    expected = [pm.generate(model, tokenizer, pm.Sample(**record), **SAMPLING) for record in records(30)]
    found = rows(job().decode())
    assert [row["line"] for row in found] == [*range(1, 21), *range(23, 33)]
    assert [(row["main"], row["branches"]) for row in found] == [(each["main"], each["branches"]) for each in records(30)]
    assert [row["outputs"] for row in found] == expected
    reasons = {reason for row in found for reason in row["finish_reasons"]}
    assert reasons == {"stop", "length"}


def test_a_reducing_branch_is_the_last_output(job, tiny):
    model, tokenizer = pm.load_model_with_lora(tiny)
    row = rows(job(reduce="the answer: ").decode())[3]
    sample = pm.Sample(row["main"], row["branches"])
    assert row["outputs"] == pm.generate(model, tokenizer, sample, reduce="the answer: ", **SAMPLING)
    assert len(row["finish_reasons"]) == len(row["branches"]) + 1


def test_several_files_of_several_kinds_are_one_sequence_of_lines(job, tmp_path):
    expected = rows(job().decode())
    data = records(30)
    (tmp_path / "in").mkdir()
    with gzip.open(tmp_path / "in" / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in data[:7])
    (tmp_path / "in" / "b.jsonl.zst").write_bytes(pa.compress(json.dumps(data[7]).encode(), "zstd", asbytes=True))
    pq.write_table(pa.Table.from_pylist(data[8:25]), tmp_path / "in" / "c.parquet", row_group_size=5)
    save(tmp_path / "in" / "d.jsonl", data[25:])
    (tmp_path / "out.jsonl").unlink()
    found = rows(job(data_path=tmp_path / "in").decode())
    assert [row["line"] for row in found] == list(range(1, 31))
    assert [row["outputs"] for row in found] == [row["outputs"] for row in expected]


@pytest.mark.parametrize(("kept", "left"), [(5, 0), (5, 17), (21, -1), (0, 9), (0, 0)])
def test_an_interrupted_run_goes_on_after_its_last_whole_row(job, tmp_path, capsys, kept, left):
    """kept: whole rows that are left; left: bytes of the next one."""
    whole = job(temperature=1.5, seed=7)
    lines = whole.splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:left])
    capsys.readouterr()
    assert job(temperature=1.5, seed=7) == whole
    err = capsys.readouterr().err
    if kept or left:
        assert f"going on after line {json.loads(lines[kept - 1])['line'] if kept else 0}, with {kept} rows" in err
    assert f"{30 - kept} samples, " in err
    assert ("in.jsonl:21: skipped" in err) == (kept < 21)


def test_a_finished_output_is_left_as_it_is(job, monkeypatch, capsys):
    whole = job()
    monkeypatch.setattr(generate_batch.Decoder, "load", None)
    assert job() == whole
    assert "finished before: " in capsys.readouterr().err


def test_an_output_that_was_begun_with_something_else_is_refused(job, tmp_path):
    whole = job()
    for fields, told in [
        ({"temperature": 0.5}, r"was begun with temperature=0\.0 \(now 0\.5\); give it these again"),
        ({"max_new_tokens": 3, "reduce": "so"}, r"max_new_tokens=12 \(now 3\), reduce=None \(now so\)"),
        ({"base_model": save_tiny(tmp_path / "other", seed=1)}, "was begun with base_model="),
        ({"visibility": "isolated"}, r"was begun with visibility=None \(now isolated\)"),
    ]:
        with pytest.raises(UserError, match=told):
            job(**fields)
    save(tmp_path / "in.jsonl", records(31))
    with pytest.raises(UserError, match=r"was begun with data_path=31 lines \(sha256 \w{12}\) \(now 31 lines \(sha256"):
        job()
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_an_adapter_that_was_trained_again_is_another_one(tmp_path):
    config = generate.GenerateConfig(data_path="x", lora_path=str(tmp_path))
    told = []
    for text in ("{}", "{ }"):
        (tmp_path / MANIFEST).write_text(text)
        told.append(generate_output.settings_of(config, generate_input.Source())["lora_path"])
    assert told[0] != told[1]
    assert all(text.startswith(f"{tmp_path} (sha256 ") for text in told)


def test_the_same_data_elsewhere_is_the_same(job, tmp_path, capsys):
    whole = job()
    (tmp_path / "in.jsonl").rename(tmp_path / "moved.jsonl")
    assert job(data_path=tmp_path / "moved.jsonl") == whole
    assert "finished before" in capsys.readouterr().err


def test_files_of_others_are_not_touched(job, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match=r"out\.jsonl: is there already, and no out\.jsonl\.run\.json beside it"):
        job()
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    with pytest.raises(UserError, match="is a folder, and num_workers=0 writes a file"):
        job(output_path=tmp_path)
    with pytest.raises(UserError, match="is a file, and num_workers=2 fills a folder"):
        job(num_workers=2)


def test_two_at_the_same_output_are_refused(job, tmp_path):
    job()
    with open(tmp_path / "out.jsonl") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing it"):
            job()


def test_the_output_may_lie_among_the_data(job, tmp_path, capsys):
    (tmp_path / "out.jsonl").touch()
    job(data_path=tmp_path)
    job(data_path=tmp_path)
    assert "finished before" in capsys.readouterr().err


def test_no_usable_line_at_all_is_an_error(job, tmp_path):
    save(tmp_path / "in.jsonl", [{"branches": []}, {"branches": ["who " * 5000]}])
    with pytest.raises(UserError, match=r"holds no usable line \(2 skipped, the first: .*in\.jsonl:1: branches must be"):
        job()


def test_many_lines_are_cut_into_stretches_that_each_know_their_place(tmp_path):
    lines = [b"", *(b"%d" % number * (number % 300) for number in range(2000))]
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for file in files:
        (tmp_path / file).write_bytes(b"\n".join(lines))
    source = generate_input.scan(files)
    assert len(source.stretches) > 10
    expected = [(f"{file}:{number}", line) for file in files for number, line in enumerate(lines, start=1)]
    found = [(entry.number, entry.place, entry.line.raw) for entry in source.entries()]
    assert found == [(number, place, line) for number, (place, line) in enumerate(expected, start=1) if line]
    assert source.samples() == len(found)
    assert source.samples(after=found[700][0]) == len(list(source.entries(found[700][0]))) == len(found) - 701


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
        (["prompt=a", "num_workers=2"], "num_workers=2: shares data_path .*; give data_path and output_path"),
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
