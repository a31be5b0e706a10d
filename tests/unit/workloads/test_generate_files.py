"""`workloads.generate` on files: rows in order, and outputs that are gone on with."""

from __future__ import annotations

import fcntl
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generating import records, rows, save
from tiny import save_tiny

import parallelmind as pm
from parallelmind.errors import UserError
from parallelmind.model.manifest import MANIFEST
from workloads.generate import batch as generate_batch
from workloads.generate import command as generate
from workloads.generate import output as generate_output
from workloads.generate import source as generate_input
from workloads.generate.config import GenerateConfig

# Ends of texts at many different steps.
SAMPLING = {"max_new_tokens": 12, "stop": ["e", "o", "t"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def job(tiny, tmp_path):
    """A command over 30 samples and a bad line in `in.jsonl`, which can be given other fields; results in
    `out.jsonl`.
    """
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
    assert f"left out: {data}:2: is not JSON" in err
    assert f"left out: {data}:5: branches[0]: holds no token" in err
    assert "bad lines left out: 2 of 4" in err


@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_a_text_file_is_one_prompt_per_line(tiny, tmp_path, capsys, ending):
    data = tmp_path / f"in.{ending}"
    with (gzip.open if ending.endswith("gz") else open)(data, "wt", newline="") as file:
        file.write("who\r\n\nwhere is\n")
    generate.main([f"base_model={tiny}", f"data_path={data}", "max_new_tokens=2"])
    assert [(row["line"], row["branches"]) for row in rows(capsys.readouterr().out)] == [
        (1, ["who"]),
        (3, ["where is"]),
    ]


def test_rows_are_in_the_order_of_the_lines_and_say_what_each_sample_says_alone(job, tiny, monkeypatch):
    monkeypatch.setattr(generate_batch, "_IN_FLIGHT", 5)
    monkeypatch.setattr(generate_batch, "_AHEAD", 9)
    model, tokenizer = pm.load_model_with_lora(tiny)
    expected = [pm.generate(model, tokenizer, pm.Sample(**record), **SAMPLING) for record in records(30)]
    found = rows(job().decode())
    assert [row["line"] for row in found] == [*range(1, 21), *range(23, 33)]
    assert [(row["main"], row["branches"]) for row in found] == [
        (each["main"], each["branches"]) for each in records(30)
    ]
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
    (tmp_path / "in" / "b.jsonl.zst").write_bytes(
        pa.compress(json.dumps(data[7]).encode(), "zstd", asbytes=True)
    )
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
        assert (
            f"going on after line {json.loads(lines[kept - 1])['line'] if kept else 0}, with {kept} rows"
            in err
        )
    assert f"{30 - kept} samples, " in err
    assert ("in.jsonl:21: " in err) == (kept < 21)


def test_a_finished_output_is_left_as_it_is(job, monkeypatch, capsys):
    whole = job()
    monkeypatch.setattr(generate_batch.Decoder, "load", None)
    assert job() == whole
    assert "finished before: " in capsys.readouterr().err


def test_an_output_that_was_begun_with_something_else_is_refused(job, tmp_path):
    whole = job()
    for fields, told in [
        ({"temperature": 0.5}, r"was begun with temperature=0\.0 \(now 0\.5\); give it these again"),
        ({"max_new_tokens": 3, "reduce": "so"}, r"max_new_tokens=12 \(now 3\), reduce=null \(now so\)"),
        ({"base_model": save_tiny(tmp_path / "other", seed=1)}, "was begun with base_model="),
        ({"visibility": "isolated"}, r"was begun with visibility=null \(now isolated\)"),
    ]:
        with pytest.raises(UserError, match=told):
            job(**fields)
    save(tmp_path / "in.jsonl", records(31))
    with pytest.raises(
        UserError, match=r"was begun with data_path=31 lines \(sha256 \w{12}\) \(now 31 lines \(sha256"
    ):
        job()
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_an_adapter_that_was_trained_again_is_another_one(tmp_path):
    config = GenerateConfig(data_path="x", lora_path=str(tmp_path))
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
    with pytest.raises(
        UserError, match=r"out\.jsonl: is there already, and no out\.jsonl\.run\.json beside it"
    ):
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
    with pytest.raises(
        UserError, match=r"holds no usable line \(bad lines: 2, the first: .*in\.jsonl:1: branches must be"
    ):
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
