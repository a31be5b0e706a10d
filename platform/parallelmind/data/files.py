"""Which files a data path means, and cutting them into byte ranges that can be read in parallel."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallelmind.errors import UserError

_SMALLEST, _LARGEST = 1 << 10, 4 << 20
_RANGES_PER_WORKER = 8


@dataclass(frozen=True, slots=True)
class ByteRange:
    file: str
    start: int
    end: int

    def lines(self) -> Iterator[bytes]:
        """The lines that begin in this range, in order, without their newline."""
        with open(self.file, "rb") as stream:
            if self.start:
                stream.seek(self.start - 1)
                stream.readline()  # the end of a line that an earlier range reads, or one newline
            while stream.tell() < self.end:
                yield stream.readline().removesuffix(b"\n")


def find_files(path: str, name: str = "data_path") -> list[str]:
    """The file itself, or every *.jsonl in a folder, sorted. Raises UserError where there is none."""
    place = Path(path).expanduser().absolute()
    if place.is_dir():
        files = sorted(str(file) for file in place.glob("*.jsonl"))
        if not files:
            raise UserError(f"{name}={path}: the folder holds no *.jsonl; give a file of parallel JSONL or a folder of them")
        return files
    if not place.is_file():
        raise UserError(f"{name}={path}: no such file; give a file of parallel JSONL or a folder of them")
    if not os.access(place, os.R_OK):
        raise UserError(f"{name}={path}: not readable; give it read permission")
    return [str(place)]


def byte_ranges(files: Sequence[str], workers: int) -> list[ByteRange]:
    """Ranges that cover the files, several for each worker; the same for the same files and worker count."""
    sizes = {file: os.path.getsize(file) for file in files}
    size = min(max(sum(sizes.values()) // (_RANGES_PER_WORKER * workers), _SMALLEST), _LARGEST)
    return [ByteRange(file, at, min(at + size, total)) for file, total in sizes.items() for at in range(0, total, size)]
