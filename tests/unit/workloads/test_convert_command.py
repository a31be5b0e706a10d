"""`python -m workloads.convert` reads every file format, writes one complete file, and reports mistakes."""

from __future__ import annotations

import gzip
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

from parallelmind import cli
from parallelmind.data.convert.readers import read_dataset
from parallelmind.errors import UserError, UserNotice
from workloads.data import convert, read_position
from workloads.data.read_position import ReadPosition

PAIR = {"prompt": "où", "response": "it"}
CONVERTED = {"prompt": "où", "completion": "it"}


def run(tmp_path: Path, *argv: str, name: str = "out.jsonl") -> list[dict[str, Any]]:
    out = tmp_path / name
    convert.main([f"output_path={out}", *argv])
    raw = gzip.decompress(out.read_bytes()) if name.endswith(".gz") else out.read_bytes()
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".part")] == []
    return [json.loads(line) for line in raw.decode("utf-8").splitlines()]


def write(path: Path, text: str | bytes) -> Path:
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", json.dumps(PAIR) + "\n\n" + json.dumps(PAIR) + "\n"),
        ("a.json", json.dumps([PAIR, PAIR])),
        ("a.json", json.dumps({"data": [PAIR, PAIR]}, indent=1)),
        ("a.json", json.dumps(PAIR) + "\n" + json.dumps(PAIR)),
        ("a.csv", "\ufeffprompt,response\r\noù,it\r\noù,it\r\n"),
    ],
)
def test_every_file_format_is_read(tmp_path: Path, name: str, text: str, packed: str) -> None:
    file = write(tmp_path / (name + packed), text)
    assert run(tmp_path, f"data_path={file}", name="out.jsonl" + packed) == [CONVERTED, CONVERTED]


def test_several_files_and_the_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [
        {"question": str(index), "answers": [{"text": text}] * len(text)}
        for index, text in enumerate(("x", "y", ""))
    ]
    write(tmp_path / "a.jsonl", json.dumps(PAIR))
    write(tmp_path / "b.json", json.dumps({"context": "A passage.", "qas": questions}))
    assert len(run(tmp_path, f"data_path={tmp_path}/*.json,{tmp_path}/a*", name="new/out.jsonl")) == 2
    line = "2 records in, 2 records out, 3 branches, 0 bad, 1 questions without an answer skipped\n"
    assert capsys.readouterr().out == line


def test_progress_tells_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(read_position, "_SECONDS_BETWEEN_LOOKS", 0.0)
    for name in ("a.jsonl", "b.jsonl.gz"):
        write(
            tmp_path / name, "".join(f'{{"prompt": "{"x" * 9999}", "response": "{n}"}}\n' for n in range(99))
        )
    assert len(run(tmp_path, f"data_path={tmp_path}/*.jsonl*")) == 198
    lines = [line for line in capsys.readouterr().err.splitlines() if "records in" in line]
    assert len([line for line in lines if re.search(r"\d bad, \d:\d\d:\d\d left$", line)]) > 20
    assert len(lines) > 100


def test_the_position_covers_all_files_and_none_of_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_position, "_SECONDS_BETWEEN_LOOKS", 0.0)
    files = [str(write(tmp_path / name, "0123456789")) for name in "ab"]
    position = ReadPosition(files)
    assert (position.total, position.num_bytes()) == (20, 0)
    with open(files[1], "rb", buffering=0) as stream:
        stream.read(4)
        assert position.num_bytes() == 14
    assert position.num_bytes() == 14
    remote = ReadPosition(["s3://bucket/a.jsonl", *files])
    assert (remote.total, remote.num_bytes()) == (None, 0)


def test_keys_without_effect_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"q": "où", "a": "it", "id": 1, "tag": "x"}, {"q": "où", "a": "it", "id": 2}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    argv = [f"data_path={file}", "columns={prompt: q, response: a, system: sys}"]
    assert run(tmp_path, *argv) == [CONVERTED, CONVERTED]
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "not used: id (2 records), tag (1 record)",
        "columns: no record has the key sys",
    ]
    assert out == "2 records in, 2 records out, 2 branches, 0 bad\n"


TRACE = (
    "<Parallel><Goal>g</Goal><Path>1: a<Parallel><Path>b</Path></Parallel></Path><Path>2: c</Path>"
    "<Conclusion>d</Conclusion></Parallel> e"
)


def test_a_tree_and_the_count_of_its_branches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = [TRACE, TRACE.replace("</Goal>", ""), TRACE * 2]
    lines = [json.dumps({"prompt": "what is it", "response": trace}) for trace in traces]
    file = write(tmp_path / "a.jsonl", "\n".join(lines))
    once, twice = run(tmp_path, f"data_path={file}", "shape=paths")
    assert once["branches"][0]["reduce"] == {
        "prompt": "<Conclusion>",
        "completion": "d</Conclusion></Parallel> e",
    }
    assert twice["branches"][0]["reduce"]["reduce"] == once["branches"][0]["reduce"]
    out, err = capsys.readouterr()
    assert out == "3 records in, 2 records out, 11 branches, 1 bad\n"
    assert (
        err
        == f"skipped: {file}:2: has <Path> in <Goal>, which is not closed, at character 17 of the answer\n"
    )
    assert len(run(tmp_path, f"data_path={file}")) == 3
    out, err = capsys.readouterr()
    assert err == "shape=flat: <Parallel> blocks of 3 records stay text; set shape=paths\n"


def test_a_shape_that_one_of_several_files_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = {"context": [["T", ["One."]]], "question": "who?", "answer": "it"}
    files = [
        write(tmp_path / "a.jsonl", json.dumps(PAIR)),
        write(tmp_path / "b.jsonl", json.dumps(question)),
        write(tmp_path / "c.txt", "a text"),
    ]
    (record,) = run(tmp_path, f"data_path={','.join(map(str, files))}", "shape=documents")
    assert record["documents"] == ["T: One."]
    out, err = capsys.readouterr()
    assert out == "1 records in, 1 records out, 1 branches, 2 bad\n"
    for kind, line in zip(("pairs", "text"), err.splitlines(), strict=True):
        assert f"is of the kind {kind}, which has no documents; remove shape, or set source to" in line


def test_text_and_a_csv_column_are_split_by_the_models_tokens(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "tiny")
    text = "\n".join(["who lives in the passage"] * 60)
    file = write(tmp_path / "a.txt.gz", text.replace("\n", "\r\n"))
    settings = [f"base_model={base}", "chunk_tokens=64"]
    assert "".join(record["text"] for record in run(tmp_path, f"data_path={file}", *settings)) == text
    table = write(tmp_path / "a.csv", f'id,body\n1,"{text}"\n2,"a ""b"""\n')
    records = run(tmp_path, f"data_path={table}", "text_column=body", *settings)
    assert "".join(record["text"] for record in records) == text + 'a "b"'
    with pytest.raises(UserError, match="source=alpaca: .* is plain text"):
        run(tmp_path, f"data_path={file}", "source=alpaca")


def test_bad_records_are_reported_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps(PAIR), "{", json.dumps({"prompt": "x"}), "[]", *["3"] * 9]
    file = write(tmp_path / "a.jsonl", "\n".join(lines).encode() + b"\n\xff\n")
    assert run(tmp_path, f"data_path={file}") == [CONVERTED]
    out, err = capsys.readouterr()
    assert out == "14 records in, 1 records out, 1 branches, 13 bad\n"
    lines = err.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith(f"skipped: {file}:2: is not JSON")
    assert lines[1].startswith(f"skipped: {file}:3: has none of prompt + response")
    assert lines[-1] == "… and 3 more bad records"


def test_a_folder_is_read_file_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write(folder / "a.json", json.dumps([PAIR]))
    write(folder / "c.csv", "prompt,response\noù,it\n")
    write(folder / "README.md", "a data set")
    with pytest.warns(UserNotice, match=r"reads 2 files of this folder and skips 2: README\.md, sub/"):
        assert run(tmp_path, f"data_path={folder}") == [CONVERTED] * 2
    write(folder / "b.jsonl.gz", json.dumps(PAIR))
    write(folder / "dataset_info.json", json.dumps({"features": {}}))
    write(folder / "e.json", "no JSON")
    with pytest.warns(UserNotice, match="reads 5 files"):
        assert run(tmp_path, f"data_path={folder}") == [CONVERTED] * 3
    output = capsys.readouterr()
    assert output.out.endswith("3 branches, 2 bad\n")
    for told in ("dataset_info.json: source=auto: cannot detect", "e.json: data_path=.* is not JSON"):
        assert re.search(told, output.err)
    with pytest.raises(UserError, match="cannot detect the kind"):
        run(tmp_path, f"data_path={folder}/dataset_info.json")


def test_an_encoding_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoding=utf9: unknown encoding: utf9; give a text encoding"):
        run(tmp_path, f"data_path={tmp_path}", "encoding=utf9")


def test_bad_csv_rows_and_text_lines_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "a.csv", b'prompt,response\na,"b\nc"\na\na,b,c\n\xff,b\n')
    assert run(tmp_path, f"data_path={table}") == [{"prompt": "a", "completion": "b\nc"}]
    err = capsys.readouterr().err
    for message in ("a.csv:4: has fewer", "a.csv:5: has more", "a.csv:6: is not UTF-8"):
        assert message in err
    base = save_tiny(tmp_path / "tiny")
    text = write(tmp_path / "a.txt", b"who\n\xffx\nlives")
    assert run(tmp_path, f"data_path={text}", f"base_model={base}") == [{"text": "who\nlives"}]
    assert "a.txt:2: byte 0 is not UTF-8" in capsys.readouterr().err


def test_damaged_archive_yields_the_records_before_the_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = gzip.compress(
        b"".join(json.dumps({**PAIR, "n": n * 7919 % 1009}).encode() + b"\n" for n in range(5000))
    )
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(archive[: len(archive) // 2])
    assert len(run(tmp_path, f"data_path={file}")) > 100
    assert "compressed data is damaged" in capsys.readouterr().err


def test_output_is_complete_or_unchanged(tmp_path: Path) -> None:
    out = write(tmp_path / "out.jsonl", "before")
    file = write(tmp_path / "a.jsonl", json.dumps(PAIR) + "\n{}\n")
    with pytest.raises(UserError, match="a.jsonl:2: has none of .*strict=false"):
        run(tmp_path, f"data_path={file}", "--strict")
    with pytest.raises(UserError, match="gives no record"):
        run(tmp_path, f"data_path={write(tmp_path / 'b.jsonl', '{')}")
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data_path=missing.jsonl"], "no such file"),
        (["data_path={0}/a.md"], "unknown ending"),
        (["data_path={0}/broken.json"], "is not JSON"),
        (["data_path={0}/broken.parquet"], "cannot be read"),
        (["data_path={0}/out.jsonl"], "is data_path="),
        ([], "exactly one of data_path"),
        (["data_path=a", "dataset=b"], "data_path and dataset: give exactly one"),
        (["data_path={0}/a.jsonl", "output_path={0}/out.json"], "end it in .jsonl"),
        (["data_path={0}/a.jsonl", "output_path={0}/a.jsonl/x.jsonl"], "cannot be written"),
        (["data_path={0}/a.jsonl", "output_path={0}/folder.jsonl"], "cannot be written"),
    ],
)
def test_mistakes_are_user_errors(tmp_path: Path, argv: list[str], message: str) -> None:
    for name in ("a.md", "broken.json", "broken.parquet"):
        write(tmp_path / name, "{ no")
    for name in ("a.jsonl", "out.jsonl"):
        write(tmp_path / name, json.dumps(PAIR))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=message):
        convert.main([f"output_path={tmp_path}/out.jsonl", *(item.format(tmp_path) for item in argv)])


def test_hub_dataset_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, Any]]:
        calls.append((args, options))
        if args[0] == "org/none":
            raise FileNotFoundError("no such data set")
        return [PAIR, {**PAIR, "id": {"hash": None}, "chosen": None}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert run(tmp_path, "dataset=org/name", "subset=main", "split=test") == [CONVERTED, CONVERTED]
    assert calls == [(("org/name", "main"), {"split": "test", "streaming": True})]
    assert [record.value for record in read_dataset("org/name", "main", "test")] == [PAIR, {**PAIR, "id": {}}]
    with pytest.raises(UserError, match="dataset=org/none .*no such data set"):
        run(tmp_path, "dataset=org/none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        run(tmp_path, "dataset=org/name")


def test_inspect_flag_runs_the_inspection(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    module = types.ModuleType("workloads.data.inspect")
    module.main = calls.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "workloads.data.inspect", module)
    convert.main(["--inspect", "a.jsonl", "show=1"])
    assert calls == [["a.jsonl", "show=1"]]


def test_help_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    convert.main(["--help"])
    assert "question_template" in capsys.readouterr().out
