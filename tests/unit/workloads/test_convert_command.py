"""`python -m workloads.convert`: every container in, one whole file out, and one line for what a user gets
wrong.
"""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

from parallelmind.errors import UserError
from workloads.data import convert

PAIR = {"prompt": "où", "response": "it"}
WRITTEN = {"prompt": "où", "completion": "it"}


def run(tmp_path: Path, *argv: str, name: str = "out.jsonl") -> list[dict[str, Any]]:
    out = tmp_path / name
    convert.main([f"output_path={out}", *argv])
    raw = gzip.decompress(out.read_bytes()) if name.endswith(".gz") else out.read_bytes()
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".part")] == []
    return [json.loads(line) for line in raw.decode("utf-8").splitlines()]


def put(path: Path, text: str | bytes) -> Path:
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
def test_every_container(tmp_path: Path, name: str, text: str, packed: str) -> None:
    file = put(tmp_path / (name + packed), text)
    assert run(tmp_path, f"data_path={file}", name="out.jsonl" + packed) == [WRITTEN, WRITTEN]


def test_several_files_and_the_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [
        {"question": str(index), "answers": [{"text": text}] * len(text)}
        for index, text in enumerate(("x", "y", ""))
    ]
    put(tmp_path / "a.jsonl", json.dumps(PAIR))
    put(tmp_path / "b.json", json.dumps({"context": "A passage.", "qas": questions}))
    assert len(run(tmp_path, f"data_path={tmp_path}/*.json,{tmp_path}/a*", name="new/out.jsonl")) == 2
    line = "2 records in, 2 records out, 3 branches, 0 bad, 1 questions without an answer left out\n"
    assert capsys.readouterr().out == line


def test_text_and_a_csv_column_are_cut_by_the_models_tokens(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "tiny")
    text = "\n".join(["who lives in the passage"] * 60)
    file = put(tmp_path / "a.txt.gz", text.replace("\n", "\r\n"))
    settings = [f"base_model={base}", "chunk_tokens=64"]
    assert "".join(record["text"] for record in run(tmp_path, f"data_path={file}", *settings)) == text
    table = put(tmp_path / "a.csv", f'id,body\n1,"{text}"\n2,"a ""b"""\n')
    found = run(tmp_path, f"data_path={table}", "text_column=body", *settings)
    assert "".join(record["text"] for record in found) == text + 'a "b"'
    with pytest.raises(UserError, match="source=alpaca: .* is plain text"):
        run(tmp_path, f"data_path={file}", "source=alpaca")


def test_bad_records_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps(PAIR), "{", json.dumps({"prompt": "x"}), "[]", *["3"] * 9]
    file = put(tmp_path / "a.jsonl", "\n".join(lines).encode() + b"\n\xff\n")
    assert run(tmp_path, f"data_path={file}") == [WRITTEN]
    out, err = capsys.readouterr()
    assert out == "14 records in, 1 records out, 1 branches, 13 bad\n"
    told = err.splitlines()
    assert len(told) == 11
    assert told[0].startswith(f"left out: {file}:2: is not JSON")
    assert told[1].startswith(f"left out: {file}:3: has none of prompt + response")
    assert told[-1] == "… and 3 more bad records"


def test_bad_rows_and_lines_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = put(tmp_path / "a.csv", b'prompt,response\na,"b\nc"\na\na,b,c\n\xff,b\n')
    assert run(tmp_path, f"data_path={table}") == [{"prompt": "a", "completion": "b\nc"}]
    err = capsys.readouterr().err
    for told in ("a.csv:4: has fewer", "a.csv:5: has more", "a.csv:6: is not UTF-8"):
        assert told in err
    base = save_tiny(tmp_path / "tiny")
    text = put(tmp_path / "a.txt", b"who\n\xffx\nlives")
    assert run(tmp_path, f"data_path={text}", f"base_model={base}") == [{"text": "who\nlives"}]
    assert "a.txt:2: byte 0 is not UTF-8" in capsys.readouterr().err


def test_a_damaged_archive_gives_what_comes_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gzip.compress(
        b"".join(json.dumps({**PAIR, "n": n * 7919 % 1009}).encode() + b"\n" for n in range(5000))
    )
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(whole[: len(whole) // 2])
    assert len(run(tmp_path, f"data_path={file}")) > 100
    assert "compressed data is damaged" in capsys.readouterr().err


def test_the_output_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    out = put(tmp_path / "out.jsonl", "before")
    file = put(tmp_path / "a.jsonl", json.dumps(PAIR) + "\n{}\n")
    with pytest.raises(UserError, match="a.jsonl:2: has none of .*strict=false"):
        run(tmp_path, f"data_path={file}", "--strict")
    with pytest.raises(UserError, match="gives no record"):
        run(tmp_path, f"data_path={put(tmp_path / 'b.jsonl', '{')}")
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["data_path=missing.jsonl"], "no such file"),
        (["data_path={0}/a.md"], "unknown ending"),
        (["data_path={0}/broken.json"], "is not JSON"),
        (["data_path={0}/broken.parquet"], "cannot be read"),
        (["data_path={0}/out.jsonl"], "is one of the files to read"),
        ([], "exactly one of data_path"),
        (["data_path=a", "dataset=b"], "data_path and dataset: give exactly one"),
        (["data_path={0}/a.jsonl", "output_path={0}/out.json"], "end it in .jsonl"),
        (["data_path={0}/a.jsonl", "output_path={0}/a.jsonl/x.jsonl"], "cannot be written"),
        (["data_path={0}/a.jsonl", "output_path={0}/folder.jsonl"], "cannot be written"),
    ],
)
def test_what_a_user_gets_wrong(tmp_path: Path, argv: list[str], said: str) -> None:
    for name in ("a.md", "broken.json", "broken.parquet"):
        put(tmp_path / name, "{ no")
    for name in ("a.jsonl", "out.jsonl"):
        put(tmp_path / name, json.dumps(PAIR))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=said):
        convert.main([f"output_path={tmp_path}/out.jsonl", *(item.format(tmp_path) for item in argv)])


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((args, options))
        if args[0] == "org/none":
            raise FileNotFoundError("no such data set")
        return [PAIR, PAIR]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert run(tmp_path, "dataset=org/name", "subset=main", "split=test") == [WRITTEN, WRITTEN]
    assert asked == [(("org/name", "main"), {"split": "test", "streaming": True})]
    with pytest.raises(UserError, match="dataset=org/none .*no such data set"):
        run(tmp_path, "dataset=org/none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        run(tmp_path, "dataset=org/name")


def test_inspect_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    module = types.ModuleType("workloads.data.inspect")
    module.main = given.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "workloads.data.inspect", module)
    convert.main(["--inspect", "a.jsonl", "show=1"])
    assert given == [["a.jsonl", "show=1"]]


def test_help_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    convert.main(["--help"])
    assert "question_template" in capsys.readouterr().out
