"""The file of a sweep's journal: whole lines that are appended one by one, also at a URI."""

from __future__ import annotations

import os

from parallelmind.errors import UserError, first_line
from parallelmind.remote import RemotePath
from parallelmind.storage import atomic_binary_file, write_line

_PART_BYTES = 1 << 16  # a part of this size takes no more lines


class JournalFile:
    """A file whose lines are on disk, and at the file's URI if it has one, when `append` returns.

    An object at a URI cannot be extended. Lines that are appended go to parts in a folder beside it, each
    named after the offset of its first byte, so that a line costs the same however long the file is.
    """

    def __init__(self, file: RemotePath) -> None:
        self._file = file
        self._parts = _beside(file, ".parts")
        self._end = self._part_start = 0

    def read(self) -> bytes:
        """The content of the file, with its parts."""
        content = self._file.read_bytes() or b""
        if self._file.uri is not None:
            for name in self._parts.list_names():
                content = content[: int(name)] + (self._parts.child(name).read_bytes() or b"")
        return content

    def start(self, content: bytes, end: int) -> RemotePath | None:
        """Append from now on after the first `end` bytes of the content; what follows them is removed.

        More than one removed line, which no interrupted write explains, is kept in a file, which is returned.
        """
        removed = content[end:]
        kept = _beside(self._file, ".removed") if b"\n" in removed.rstrip(b"\n") else None
        if kept:
            _replace(kept, removed)
        if self._file.uri is not None:
            _replace(self._file, content[:end])
            self._parts.delete_remote()
        elif removed:
            os.truncate(self._file.local, end)
        self._end = self._part_start = end
        return kept

    def append(self, line: bytes) -> None:
        """Raises UserError if the line cannot be written; the file then ends where it did before."""
        path = self._file.local
        try:
            end = write_line(path, self._end, line, sync=True)
        except OSError as error:
            raise UserError(
                f"{self._file.field}={path}: cannot be written ({error.strerror or first_line(error)}); "
                "free space on that disk and run the same command"
            ) from error
        try:
            self._upload_part()
        except UserError:
            os.truncate(path, self._end)
            raise
        self._end = end
        if end - self._part_start >= _PART_BYTES:
            self._part_start = end

    def _upload_part(self) -> None:
        """Copy the lines of the last part to the URI."""
        if self._file.uri is not None:
            with open(self._file.local, "rb") as file:
                file.seek(self._part_start)
                self._parts.child(f"{self._part_start:012}").write_bytes(file.read())


def _beside(file: RemotePath, suffix: str) -> RemotePath:
    return file.parent.child(f"{file.local.name}{suffix}")


def _replace(file: RemotePath, content: bytes) -> None:
    """Replace a file as a whole, on this machine and at its URI."""
    with atomic_binary_file(file.local) as local:
        local.write(content)
    file.upload()
