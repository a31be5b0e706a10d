"""Folders at a URI: which files are copied in which order, which ones stay, and how errors are reported."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import s3

from parallelmind.errors import UserError
from parallelmind.remote import RemotePath, fetch_cached
from workloads.common.stopping import StopFile


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    with s3.server() as environment:
        yield environment


@pytest.fixture(params=["memory", "s3"])
def uri(
    request: pytest.FixtureRequest, tmp_path: Path, bucket: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """A new URI, and an empty cache on this machine."""
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    return f"memory://{uuid4().hex}" if request.param == "memory" else f"s3://{s3.BUCKET}/{uuid4().hex}"


def fill(folder: Path, **files: str) -> None:
    """Write files. In their names `__` stands for a slash and `_` for a dot."""
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def read_files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def test_uploaded_folder_can_be_downloaded_elsewhere(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RemotePath.at(uri).child("run")
    fill(run.local, a_txt="1", inner__b_txt="2")
    run.upload()
    assert run.list_names() == ["a.txt", "inner"]
    assert run.child("inner").child("b.txt").read_bytes() == b"2"
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "another"))
    copy = RemotePath.at(f"{uri}/run/")
    assert copy.local != run.local
    copy.download()
    assert read_files(copy.local) == {"a.txt": "1", "inner/b.txt": "2"}


def test_download_keeps_excluded_and_hidden_files(uri: str) -> None:
    run = RemotePath.at(uri)
    fill(run.local, a_txt="1", big_bin="2")
    run.upload()
    fill(run.local, a_txt="old", big_bin="mine", gone_txt="x", _lock="held", _part__new="half")
    run.download(exclude="*.bin")
    assert read_files(run.local) == {"a.txt": "1", "big.bin": "mine", ".lock": "held", ".part/new": "half"}
    run.upload()
    assert run.list_names() == ["a.txt", "big.bin"]


def test_marker_file_is_uploaded_last(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted copy is never mistaken for a complete one."""
    run = RemotePath.at(uri).child("adapter")
    fill(run.local, a_note="first of all by name", z_weights="w")
    put_file, order = fsspec.AbstractFileSystem.put_file, list[str]()

    def record(self: object, path: str, target: str, **options: object) -> None:
        order.append(Path(path).name)
        put_file(self, path, target, **options)

    monkeypatch.setattr(fsspec.AbstractFileSystem, "put_file", record)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", record, raising=False)
    run.upload(last="a.note")
    assert order == ["z.weights", "a.note"]


def test_folder_is_fetched_again_only_if_its_marker_has_changed(uri: str, tmp_path: Path) -> None:
    run = RemotePath.at(uri).child("adapter")
    fill(run.local, note_json="1", weights="a")
    run.upload(last="note.json")
    folder = fetch_cached(str(run), "note.json", "lora_path")
    assert folder == run.local
    fill(folder, weights="touched")
    assert read_files(fetch_cached(str(run), "note.json", "lora_path"))["weights"] == "touched"
    other_copy = RemotePath(tmp_path / "other", run.uri)
    fill(other_copy.local, note_json="2", weights="b")
    other_copy.upload(last="note.json")
    assert read_files(fetch_cached(str(run), "note.json", "lora_path"))["weights"] == "b"
    with pytest.raises(UserError, match=r"lora_path=.*/none: holds no note.json; "):
        fetch_cached(f"{uri}/none", "note.json", "lora_path")


def test_delete_remote_keeps_the_local_copy(uri: str) -> None:
    run = RemotePath.at(uri)
    fill(run.local, old__a_txt="1", b_txt="2")
    run.upload()
    run.child("old").delete_remote()
    run.child("never").delete_remote()
    assert run.list_names() == ["b.txt"]
    assert read_files(run.local) == {"old/a.txt": "1", "b.txt": "2"}


@pytest.mark.parametrize("path", ["s3://no-such-bucket/x", "nonsense://x"])
def test_unreachable_uri_is_reported_in_one_line(path: str, uri: str) -> None:
    file = RemotePath.at(path)
    file.local.parent.mkdir(parents=True, exist_ok=True)
    file.local.write_text("x")
    with pytest.raises(
        UserError, match=f"output_dir={path}: cannot be reached .*; check address and credentials"
    ) as caught:
        file.upload()
    assert "\n" not in str(caught.value)


def test_full_disk_is_reported_as_such(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RemotePath.at(uri)
    fill(run.local, a_txt="1")
    run.upload()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("parallelmind.remote.shutil.copyfileobj", full)
    with pytest.raises(
        UserError, match=rf"^output_dir={uri}: a disk is full \(.*\); make room .*{run.local}$"
    ):
        run.download()
    assert read_files(run.local) == {"a.txt": "1"}


def test_local_folder_is_used_without_a_copy(tmp_path: Path) -> None:
    run = RemotePath.at(tmp_path / "runs").child("run")
    assert run == RemotePath(tmp_path / "runs" / "run")
    fill(run.local, a_txt="1")
    run.upload()
    run.download()
    run.delete_remote()
    assert run.list_names() == ["a.txt"]
    assert run.child("a.txt").read_bytes() == b"1"
    assert run.child("b.txt").read_bytes() is None
    assert fetch_cached(tmp_path, "a.txt", "lora_path") == tmp_path


def test_stop_of_a_run_at_a_uri_can_be_requested(uri: str) -> None:
    file = RemotePath.at(f"{uri}/run").child("STOP")
    assert not file.local.parent.exists()
    StopFile(file).request()
    assert file.read_bytes() == b""
