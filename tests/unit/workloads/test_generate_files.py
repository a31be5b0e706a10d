"""`workloads.generate` on files: row order, resumed and refused outputs, and input shards."""

from __future__ import annotations

import gzip
import json
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disk import file_size_limit
from generating import parse_rows, random_records, write_records
from tiny import save_tiny, tiny_tokenizer

import parallelmind as pm
from parallelmind.errors import UserError, UserNotice
from parallelmind.model.manifest import MANIFEST, WEIGHTS
from parallelmind.storage import try_lock_path
from workloads.generate import decoder as decoder_module
from workloads.generate import distributed
from workloads.generate.command import main as generate
from workloads.generate.config import GenerateConfig
from workloads.generate.dataset import InputDataset, scan_files
from workloads.generate.manifest import run_settings
from workloads.generate.part_writer import PartWriter

# With these stop strings, branches end at many different steps.
SAMPLING = {"max_new_tokens": 12, "stop": ["e", "o", "t"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run_generate(tiny, tmp_path):
    """A function that runs the command and returns the bytes of `out.jsonl`.

    Its input, `in.jsonl`, holds 30 samples, an invalid line and a blank line. Keyword arguments override
    fields of the command.
    """
    write_records(tmp_path / "in.jsonl", random_records(30))
    lines = (tmp_path / "in.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "in.jsonl").write_bytes(b"".join([*lines[:20], b"{bad\n", b"\n", *lines[20:]]))

    def run(**overrides) -> bytes:
        stop = "stop=[{}]".format(",".join(SAMPLING["stop"]))
        fields = {
            "base_model": tiny,
            "max_new_tokens": 12,
            "data_path": tmp_path / "in.jsonl",
            "output_path": tmp_path / "out.jsonl",
        }
        generate([stop, *(f"{name}={value}" for name, value in {**fields, **overrides}.items())])
        return (tmp_path / "out.jsonl").read_bytes()

    return run


def test_invalid_lines_are_reported_and_skipped(tiny, tmp_path, capsys):
    data, output = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    data.write_text(
        '{"main": "the", "branches": [{"prompt": "who ", "completion": "lives"}, "in"]}\n'
        "{not json\n\n"
        '{"text": "the answer is in", "answer_offset": 2}\n'
        '{"branches": [{"prompt": "", "completion": "x"}]}\n'
        '{"text": "<s>who</s> is", "targets": [[4, 5]], "rendered": true}\n'
    )
    generate([f"base_model={tiny}", f"data_path={data}", f"output_path={output}", "max_new_tokens=2"])
    first, second, rendered = parse_rows(output.read_text())
    assert first["branches"] == ["who ", "in"]
    assert len(second["branches"][0]) == 2, "a text is continued from its answer offset"
    assert rendered["branches"] == [tiny_tokenizer()("<s>who</s> is", add_special_tokens=False).input_ids[:4]]
    assert (first["line"], second["line"]) == (1, 4)
    err = capsys.readouterr().err
    assert f"skipped {data}:2: is not JSON" in err
    assert f"skipped {data}:5: branches[0]: holds no token" in err
    assert "skipped 2 of 5 lines" in err


@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_text_file_holds_one_prompt_per_line(tiny, tmp_path, capsys, ending):
    data = tmp_path / f"in.{ending}"
    with (gzip.open if ending.endswith("gz") else open)(data, "wt", newline="") as file:
        file.write("who\r\n\nwhere is\n")
    generate([f"base_model={tiny}", f"data_path={data}", "max_new_tokens=2"])
    assert [(row["line"], row["branches"]) for row in parse_rows(capsys.readouterr().out)] == [
        (1, ["who"]),
        (3, ["where is"]),
    ]


def test_rows_keep_input_order_and_equal_separate_generation(run_generate, tiny, monkeypatch):
    monkeypatch.setattr(decoder_module, "_MAX_IN_FLIGHT", 5)
    monkeypatch.setattr(decoder_module, "_MAX_PENDING", 9)
    model, tokenizer = pm.load_model_with_lora(tiny)
    records = random_records(30)
    expected = [pm.generate(model, tokenizer, pm.Sample(**record), **SAMPLING) for record in records]
    rows = parse_rows(run_generate().decode())
    assert [row["line"] for row in rows] == [*range(1, 21), *range(23, 33)]
    assert [(row["main"], row["branches"]) for row in rows] == [
        (record["main"], record["branches"]) for record in records
    ]
    assert [row["outputs"] for row in rows] == expected
    reasons = {reason for row in rows for reason in row["finish_reasons"]}
    assert reasons == {"stop", "length"}


def test_reduce_branch_is_the_last_output(run_generate, tiny):
    model, tokenizer = pm.load_model_with_lora(tiny)
    row = parse_rows(run_generate(reduce="the answer: ").decode())[3]
    sample = pm.Sample(row["main"], row["branches"])
    assert row["outputs"] == pm.generate(model, tokenizer, sample, reduce="the answer: ", **SAMPLING)
    assert len(row["finish_reasons"]) == len(row["branches"]) + 1


def test_a_line_may_have_its_own_reduce_and_documents(tiny, tmp_path, capsys):
    documents = ["the passage", " where it lives"]
    records = [
        {
            "branches": [{"text": text, "targets": []} for text in documents],
            "reduce": {"prompt": " who?", "completion": " it"},
        },
        {
            "main": "the",
            "branches": [{"prompt": " a", "completion": " b", "branches": ["who", "it"], "reduce": " is"}],
        },
        {"main": "the", "branches": [" answer", " question"]},
    ]
    write_records(tmp_path / "in.jsonl", records)
    generate([f"base_model={tiny}", f"data_path={tmp_path / 'in.jsonl'}", "max_new_tokens=6", "reduce= so"])
    first, nested, last = parse_rows(capsys.readouterr().out)
    model, tokenizer = pm.load_model_with_lora(tiny)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in documents]
    sample = pm.Sample("", [[*ids[0], tokenizer.eos_token_id], [*ids[1], tokenizer.eos_token_id]])
    read_only = [{"max_new_tokens": 0}] * 2
    expected = pm.generate(model, tokenizer, sample, per_branch=read_only, reduce=" who?", max_new_tokens=6)
    assert expected[-1]
    assert first == {
        "line": 1,
        "main": "",
        "branches": documents,
        "reduce": " who?",
        "outputs": expected,
        "finish_reasons": ["length"] * 3,
    }
    assert (last["line"], last["reduce"], len(last["outputs"])) == (3, " so", 3)
    tree = pm.Sample("the", [pm.Segment(" a", ["who", "it"], " is")], reduce=" so")
    assert nested == {
        "line": 2,
        "main": "the",
        "branches": [{"text": " a", "branches": ["who", "it"], "reduce": " is"}],
        "reduce": " so",
        "outputs": pm.generate(model, tokenizer, tree, max_new_tokens=6),
        "finish_reasons": nested["finish_reasons"],
    }
    assert len(nested["outputs"]) == len(nested["finish_reasons"]) == 5


def test_an_interrupted_output_of_trees_is_resumed(run_generate, tmp_path):
    records = [
        {
            "branches": [{"text": text, "targets": []} for text in record["branches"]],
            "reduce": {"prompt": " who?", "completion": " it"},
        }
        for record in random_records(12)
    ]
    write_records(tmp_path / "in.jsonl", records)
    expected = run_generate(temperature=1.5, seed=7)
    assert len(parse_rows(expected.decode())) == 12
    lines = expected.splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:9])
    assert run_generate(temperature=1.5, seed=7) == expected


def test_files_of_several_formats_are_one_sequence_of_lines(run_generate, tmp_path):
    expected = parse_rows(run_generate().decode())
    records = random_records(30)
    (tmp_path / "in").mkdir()
    with gzip.open(tmp_path / "in" / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records[:7])
    (tmp_path / "in" / "b.jsonl.zst").write_bytes(
        pa.compress(json.dumps(records[7]).encode(), "zstd", asbytes=True)
    )
    pq.write_table(pa.Table.from_pylist(records[8:25]), tmp_path / "in" / "c.parquet", row_group_size=5)
    write_records(tmp_path / "in" / "d.jsonl", records[25:])
    (tmp_path / "out.jsonl").unlink()
    rows = parse_rows(run_generate(data_path=tmp_path / "in").decode())
    assert [row["line"] for row in rows] == list(range(1, 31))
    assert [row["outputs"] for row in rows] == [row["outputs"] for row in expected]


@pytest.mark.parametrize(("complete_rows", "partial_bytes"), [(5, 0), (5, 17), (21, -1), (0, 9), (0, 0)])
def test_interrupted_run_resumes_after_its_last_complete_row(
    run_generate, tmp_path, capsys, complete_rows, partial_bytes
):
    """partial_bytes: how much of the row after the complete ones is on disk."""
    expected = run_generate(temperature=1.5, seed=7)
    lines = expected.splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(
        b"".join(lines[:complete_rows]) + lines[complete_rows][:partial_bytes]
    )
    capsys.readouterr()
    assert run_generate(temperature=1.5, seed=7) == expected
    err = capsys.readouterr().err
    if complete_rows or partial_bytes:
        last_line = json.loads(lines[complete_rows - 1])["line"] if complete_rows else 0
        assert f"resuming after line {last_line}, with {complete_rows} rows" in err
    assert f"{30 - complete_rows} samples, " in err
    assert ("in.jsonl:21: " in err) == (complete_rows < 21)


@pytest.mark.parametrize("extra_bytes", [0, 1, 60])
def test_full_disk_is_told_in_one_line_and_leaves_whole_rows(run_generate, tmp_path, extra_bytes):
    """extra_bytes: how much of the row after the whole ones fits on the disk."""
    expected = run_generate(temperature=1.5, seed=7)
    whole = b"".join(expected.splitlines(keepends=True)[:15])
    output = tmp_path / "out.jsonl"
    output.unlink()
    with file_size_limit(len(whole) + extra_bytes), pytest.raises(UserError) as caught:
        run_generate(temperature=1.5, seed=7)
    assert str(caught.value).startswith(
        f"output_path={output}: cannot be written (File too large); make room"
    )
    assert output.read_bytes() == whole
    assert run_generate(temperature=1.5, seed=7) == expected


def test_full_disk_before_the_first_row_is_told_in_one_line(run_generate, tmp_path):
    with (
        file_size_limit(9),
        pytest.raises(UserError, match=r"^output_path=.*cannot be written \(File too large"),
    ):
        run_generate()
    assert [row["line"] for row in parse_rows(run_generate().decode())][-1] == 32


def test_complete_output_is_left_unchanged(run_generate, monkeypatch, capsys):
    expected = run_generate()
    monkeypatch.setattr(decoder_module.Decoder, "load", None)
    assert run_generate() == expected
    assert "already complete: " in capsys.readouterr().err


def test_output_of_other_settings_is_refused(run_generate, tmp_path):
    expected = run_generate()
    for overrides, message in [
        ({"temperature": 0.5}, r"was started with temperature=0\.0 \(now 0\.5\); restore these values"),
        ({"max_new_tokens": 3, "reduce": "so"}, r"max_new_tokens=12 \(now 3\), reduce=null \(now so\)"),
        ({"base_model": save_tiny(tmp_path / "other", seed=1)}, "was started with base_model="),
        ({"visibility": "isolated"}, r"was started with visibility=null \(now isolated\)"),
    ]:
        with pytest.raises(UserError, match=message):
            run_generate(**overrides)
    write_records(tmp_path / "in.jsonl", random_records(31))
    with pytest.raises(
        UserError, match=r"was started with data_path=31 lines \(sha256 \w{12}\) \(now 31 lines \(sha256"
    ):
        run_generate()
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_manifest_distinguishes_retrained_adapters(tmp_path):
    config = GenerateConfig(data_path="x", lora_path=str(tmp_path))
    settings = []
    for name, text in ((WEIGHTS, "a"), (WEIGHTS, "b"), (MANIFEST, "{}"), (MANIFEST, "{ }")):
        (tmp_path / name).write_text(text)
        settings.append(run_settings(config, InputDataset())["lora_path"])
    assert len(set(settings)) == 4
    assert all(text.startswith(f"{tmp_path} (sha256 ") for text in settings)
    at_uri = GenerateConfig(data_path="x", lora_path=tmp_path.as_uri())
    assert settings[-1].endswith(run_settings(at_uri, InputDataset())["lora_path"].partition(" ")[2])


def test_manifest_does_not_depend_on_the_data_path(run_generate, tmp_path, capsys):
    expected = run_generate()
    (tmp_path / "in.jsonl").rename(tmp_path / "moved.jsonl")
    assert run_generate(data_path=tmp_path / "moved.jsonl") == expected
    assert "already complete" in capsys.readouterr().err


def test_unrelated_files_are_not_overwritten(run_generate, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(
        UserError, match=r"out\.jsonl: already exists, and there is no out\.jsonl\.run\.json beside it"
    ):
        run_generate()
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    with pytest.raises(UserError, match="is a folder, and num_workers=0 writes a file"):
        run_generate(output_path=tmp_path)
    with pytest.raises(UserError, match="is a file, and num_workers=2 fills a folder"):
        run_generate(num_workers=2)


def test_second_writer_of_the_same_output_is_refused(run_generate, tmp_path):
    run_generate()
    with (
        try_lock_path(tmp_path / "out.jsonl"),
        pytest.raises(UserError, match="another process is writing it"),
    ):
        run_generate()


def test_output_inside_the_data_folder_is_not_read(run_generate, tmp_path, capsys):
    (tmp_path / "out.jsonl").touch()
    run_generate(data_path=tmp_path)
    with pytest.warns(UserNotice, match=r"skips 1: out\.jsonl\.run\.json"):
        run_generate(data_path=tmp_path)
    assert "already complete" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le"])
def test_a_text_file_that_is_not_utf8_is_not_decoded(run_generate, tmp_path, encoding):
    """Replacement characters or NULs would be prompts that nobody wrote."""
    (tmp_path / "in.txt").write_bytes("wér\nwhö\n".encode(encoding))
    with pytest.raises(UserError, match=r"no usable line \([23] lines skipped, the first: .*(UTF|utf)-"):
        run_generate(data_path=tmp_path / "in.txt")


def test_input_without_a_usable_line_is_an_error(run_generate, tmp_path):
    write_records(tmp_path / "in.jsonl", [{"branches": []}, {"branches": ["who " * 5000]}])
    with pytest.raises(
        UserError,
        match=r"holds no usable line \(2 lines skipped, the first: .*in\.jsonl:1: branches must be",
    ):
        run_generate()


def test_shards_preserve_line_numbers_and_locations(tmp_path):
    lines = [b"", *(b"%d" % number * (number % 300) for number in range(2000))]
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for file in files:
        (tmp_path / file).write_bytes(b"\n".join(lines))
    dataset = scan_files(files)
    assert len(dataset.shards) > 10
    expected = [(f"{file}:{number}", line) for file in files for number, line in enumerate(lines, start=1)]
    read = [(line.number, line.location, line.line.raw) for line in dataset.read()]
    assert read == [
        (number, location, line) for number, (location, line) in enumerate(expected, start=1) if line
    ]
    assert dataset.count() == len(read)
    after = read[700][0]
    assert dataset.count(after) == len(list(dataset.read(after))) == len(read) - 701


def test_a_compressed_output_is_refused(run_generate, tmp_path):
    with pytest.raises(UserError, match=r"out.jsonl.gz: rows are added to the file, .*; choose out.jsonl$"):
        run_generate(output_path=tmp_path / "out.jsonl.gz")
    assert not (tmp_path / "out.jsonl.gz").exists()


def test_parts_on_disks_of_other_nodes_are_missed(tmp_path, monkeypatch):
    """Before, the command ended as if all rows had been written."""

    def run_tasks(config, folder, tasks):
        """A cluster whose second node has a disk of its own at the same path."""
        for number, task in enumerate(tasks):
            node = folder if number == 0 else tmp_path / "node"
            node.mkdir(exist_ok=True)
            (node / f"part-{task['index']:05}.jsonl").write_text("{}\n" * task["samples"])
            yield {"samples": task["samples"], "tokens": 1, "skipped": []}

    monkeypatch.setattr(distributed, "_run_tasks", run_tasks)
    (tmp_path / "in.jsonl").write_text(('{"branches": ["%s"]}\n' % ("a" * 4000)) * 20)
    fields = {"data_path": str(tmp_path / "in.jsonl"), "output_path": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"out: \d+ of \d+ parts are not in it, .* all nodes .* share"):
        distributed.generate_on_cluster(GenerateConfig(**fields, num_workers=2))


def test_a_worker_that_lacks_the_input_is_told_in_one_line(tmp_path):
    writer = PartWriter.__new__(PartWriter)
    writer.config, writer.error = Mock(folder=tmp_path), ""
    writer.decoder = Mock(tokens=0, decode=lambda lines: map(list, [lines]))
    part = {"file": str(tmp_path / "absent.jsonl"), "start": 0, "end": 9}
    writer._write_part(0, part, lines=1, lines_before=0, lines_before_in_file=0, samples=1)
    assert writer.error.startswith("num_workers: a worker cannot read or write a file (")
