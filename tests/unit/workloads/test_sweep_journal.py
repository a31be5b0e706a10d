"""The journal of a sweep survives torn writes and full disks, and its state equals that of a replay."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from disk import file_size_limit, fill, small_disk
from ray.tune import TuneError

from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from workloads.sweep import tune
from workloads.sweep.journal import Journal
from workloads.sweep.journal_file import JournalFile

LAST = {"trial": 0, "step": 9, "metrics": {"loss": 0.5, "grün": 1.0}}


@pytest.fixture(params=["local", "uri"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    """The file of a journal, without a URI and with one."""
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    folder = RemotePath.at(tmp_path / "sweep" if request.param == "local" else f"file://{tmp_path}/bucket")
    folder.local.mkdir(parents=True)
    return folder.child("journal.jsonl")


def state(journal: Journal) -> tuple[Any, ...]:
    return journal.trials, journal.reports, journal.notes


def assert_replays(journal: Journal) -> None:
    assert state(Journal.open(journal.file)) == state(journal)


def begin(file: RemotePath) -> Journal:
    """A journal with some events."""
    journal = Journal.open(file)
    journal.add_notes(mlflow_key="k")
    journal.add_trial(0, {"lora_rank": 4, "seed": 0})
    journal.set_location(0, "folder", "run")
    journal.add_report(0, 5, {"loss": 1.0})
    return journal


def append_to_file(file: RemotePath, content: bytes) -> None:
    """Append to the file of a journal, at its URI as well."""
    Journal.open(file)  # puts the parts together
    with open(file.local, "ab") as local:
        local.write(content)
    file.upload()


TAILS = {
    "zeros": bytes(700),
    "half a line": b'{"trial": 0, "st',
    "half a line with its end": b'{"trial": 0, "st\n',
    "no object": b"5\n",
    "no text": b"\xff\xfe\xfd\n",
}


@pytest.mark.parametrize(
    "tail", [json.dumps(LAST).encode()[:cut] for cut in range(1, len(json.dumps(LAST)) + 1)]
)
def test_an_event_that_was_torn_at_any_byte_did_not_happen(tmp_path: Path, tail: bytes) -> None:
    journal = begin(RemotePath(tmp_path / "journal.jsonl"))
    whole = journal.file.local.read_bytes()
    journal.file.local.write_bytes(whole + tail)
    resumed = Journal.open(journal.file)
    assert state(resumed) == state(journal)
    assert journal.file.local.read_bytes() == whole
    resumed.add_report(0, 9, {"loss": 0.5})
    assert resumed.trials[0].step == 9
    assert_replays(resumed)


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_what_follows_the_last_event_is_removed_and_told(
    file: RemotePath, tail: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = begin(file)
    whole = file.local.read_bytes()
    append_to_file(file, tail)
    capsys.readouterr()
    resumed = Journal.open(file)
    assert (
        capsys.readouterr().err
        == f"note: {file}: its last {len(tail)} bytes hold no whole event and are removed\n"
    )
    assert state(resumed) == state(journal)
    assert file.read_bytes() == whole
    resumed.end_trial(0, "finished")
    assert_replays(resumed)
    assert capsys.readouterr().err == ""


def test_events_behind_a_damaged_one_are_kept_in_another_file(
    file: RemotePath, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = begin(file)
    damaged = b'{"trial": 0, "st{"trial": 0, "step": 7, "metrics": {}}\n{"trial": 0, "status": "finished"}\n'
    append_to_file(file, damaged)
    resumed = Journal.open(file)
    assert capsys.readouterr().err.endswith(f"hold no whole event and are moved to {file}.removed\n")
    assert state(resumed) == state(journal)
    assert (
        RemotePath(Path(f"{file.local}.removed"), file.uri and f"{file.uri}.removed").read_bytes() == damaged
    )
    resumed.end_trial(0, "stopped")
    assert_replays(resumed)


@pytest.mark.parametrize(
    "event",
    [
        {"later": 1},
        {"trial": 7, "status": "finished", "error": None},
        {"trial": 0, "metrics": {}},
        {"trial": 0, "step": 9, "metrics": [1]},
        {"notes": [1]},
    ],
)
def test_a_whole_event_of_another_version_is_told_and_stays(file: RemotePath, event: dict[str, Any]) -> None:
    begin(file)
    append_to_file(file, json.dumps(event).encode() + b"\n")
    content = file.read_bytes()
    assert re.fullmatch(
        f"output_dir={file}: line 5 is not an event of this version .*", refused(lambda: Journal.open(file))
    )
    assert file.read_bytes() == content


def refused(event: Callable[[], Any]) -> str:
    """The message of an event that cannot be written."""
    with pytest.raises(UserError) as caught:
        event()
    return str(caught.value)


def test_a_disk_that_fills_at_any_byte_of_an_event_leaves_the_events_before(file: RemotePath) -> None:
    journal = begin(file)
    before, whole = state(Journal.open(file)), file.local.read_bytes()
    size = len(json.dumps(LAST))
    for written in range(size + 1):
        with file_size_limit(len(whole) + written):
            message = refused(lambda: journal.add_report(0, 9, LAST["metrics"]))  # type: ignore[arg-type]
        assert "\n" not in message
        assert file.local.read_bytes() == whole
        assert state(journal) == before
    remedy = "free space on that disk and run the same command"
    assert message == f"output_dir={file.local}: cannot be written (File too large); {remedy}"
    assert str(journal.error) == message
    assert_replays(journal)
    journal.add_report(0, 9, LAST["metrics"])  # type: ignore[arg-type]
    assert journal.trials[0].step == 9
    assert_replays(journal)


@pytest.mark.parametrize("has_uri", [False, True])
def test_a_full_disk_refuses_an_event_and_takes_it_when_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_uri: bool
) -> None:
    """At a URI the disk of the URI is full, and this machine has space."""
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    with small_disk(tmp_path / "disk", 64) as disk:
        folder = RemotePath.at(f"file://{disk}" if has_uri else disk)
        folder.local.mkdir(parents=True, exist_ok=True)
        journal = begin(folder.child("journal.jsonl"))
        filler = fill(disk)
        settings = {"text": "x" * 5000}
        message = refused(lambda: [journal.add_trial(number, settings) for number in range(1, 99)])
        assert "No space left on device" in message
        assert "\n" not in message
        count = len(journal.trials)
        refused(lambda: journal.add_trial(count, settings))
        assert len(journal.trials) == count
        filler.unlink()
        assert_replays(journal)
        journal.add_trial(count, settings)
        assert_replays(journal)


def test_a_line_that_could_not_be_cut_off_is_cut_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(RemotePath(tmp_path / "journal.jsonl"))
    size = journal.file.local.stat().st_size

    def refuse(path: Path, length: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, file_size_limit(size + 9):
        patch.setattr(os, "truncate", refuse)
        refused(lambda: journal.end_trial(0, "finished"))
    assert journal.file.local.stat().st_size == size + 9
    assert not journal.trials[0].ended
    journal.end_trial(0, "stopped")
    assert_replays(journal)


def test_a_failed_trial_that_runs_again_has_no_error(file: RemotePath) -> None:
    journal = Journal.open(file)
    journal.add_trial(0, {})
    journal.set_location(0, "trial", "run")
    journal.end_trial(0, "failed", "out of memory")
    journal.set_location(0, "trial", "run")
    assert (journal.trials[0].status, journal.trials[0].error) == ("running", None)
    assert Journal.open(file).trials[0] == journal.trials[0]


def test_what_is_in_memory_is_what_would_be_read_again(file: RemotePath) -> None:
    journal = begin(file)
    journal.add_trial(1, {"points": (1, 2.0), "map": {8: "x"}})
    journal.add_report(0, 6, {"loss": 1}, "finished")
    assert_replays(journal)


class Cost:
    """Counts what an event does: calls of functions, and bytes written to files and to a URI."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.uploaded = 0
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 10,000 of them take a minute
        write_bytes = RemotePath.write_bytes

        def count(remote: RemotePath, content: bytes) -> None:
            self.uploaded += len(content)
            write_bytes(remote, content)

        monkeypatch.setattr(RemotePath, "write_bytes", count)

    def count_call(self, frame: FrameType, kind: str, argument: object) -> None:
        self.calls += kind in ("call", "c_call")

    def of(self, event: Callable[[], Any]) -> tuple[int, int]:
        """(calls, bytes uploaded) of an event."""
        self.calls = self.uploaded = 0
        sys.setprofile(self.count_call)
        try:
            event()
        finally:
            sys.setprofile(None)
        return self.calls, self.uploaded


def test_the_cost_of_an_event_does_not_grow(file: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10,000 events; at a URI, where each is a copy of a file, of 1,000 in small parts."""
    part_bytes, count = 1 << 12, 1_000 if file.uri else 10_000
    monkeypatch.setattr("workloads.sweep.journal_file._PART_BYTES", part_bytes)
    journal, cost = begin(file), Cost(monkeypatch)

    def report(index: int) -> Callable[[], Any]:
        return lambda: journal.add_report(0, 100_000 + index, {"loss": 1.0})

    first = cost.of(report(0))
    for index in range(1, count - 1):
        report(index)()
    last = cost.of(report(count - 1))
    assert last[0] == first[0]
    assert last[1] < part_bytes + 100
    assert len(journal.reports) == count + 1
    assert_replays(journal)


def test_a_journal_that_an_earlier_version_left_at_a_uri_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    folder = RemotePath.at(f"file://{tmp_path}/bucket")
    folder.local.mkdir(parents=True)
    file = folder.child("journal.jsonl")
    file.local.write_text('{"trial": 0, "settings": {}}\n{"trial": 0, "step": 1, "metrics": {}}\n')
    file.upload()
    file.local.unlink()
    journal = Journal.open(file)
    journal.add_report(0, 2, {"loss": 1.0})
    file.local.unlink()  # as on another machine
    assert_replays(journal)
    assert Journal.open(file).trials[0].step == 2


def test_parts_at_a_uri_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("workloads.sweep.journal_file._PART_BYTES", 100)
    folder = RemotePath.at(f"file://{tmp_path}/bucket")
    folder.local.mkdir(parents=True)
    file = folder.child("journal.jsonl")
    journal = begin(file)
    for step in range(10, 30):
        journal.add_report(0, step, {"loss": 1.0})
        if step == 20:
            file.upload()  # as the end of a sweep does
        content = file.local.read_bytes()
        assert JournalFile(file).read() == content
    assert len(list((tmp_path / "bucket" / "journal.jsonl.parts").iterdir())) > 5
    assert_replays(journal)
    assert not (tmp_path / "bucket" / "journal.jsonl.parts").exists()
    assert (tmp_path / "bucket" / "journal.jsonl").read_bytes() == content


@pytest.mark.parametrize("raises", [True, False])
def test_a_sweep_ends_with_the_error_of_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises: bool
) -> None:
    """Ray Tune raises an error of its own in place of the scheduler's, or logs it and goes on."""
    journal = begin(RemotePath(tmp_path / "journal.jsonl"))

    class Tuner:
        def fit(self) -> None:
            with file_size_limit(1):
                refused(lambda: journal.end_trial(0, "finished"))
            if raises:
                raise TuneError("Traceback …")

    class Exhausted:
        def __init__(self, *arguments: object) -> None:
            pass

        def is_exhausted(self) -> bool:
            return False

    context: Any = type("Context", (), {"config": None, "sweep_dir": RemotePath(tmp_path)})()
    monkeypatch.setattr(tune, "JournalingScheduler", Exhausted)
    monkeypatch.setattr(tune, "JournalSearcher", Exhausted)
    monkeypatch.setattr(tune, "_tuner", lambda *arguments: Tuner())
    with pytest.raises(UserError, match="run the same command"):
        tune.run_trials(context, journal, lambda number: None, lambda hook: None)
