"""The input files as one numbered sequence of lines, split into shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parallelmind.data.files import FileFormat, FilePart, file_parts, find_files
from parallelmind.data.lines import read_lines
from workloads.generate.lines import InputLine, is_blank, is_text_file

_TARGET_SHARDS = 64  # number of shards to aim for with uncompressed files
_MIN_SHARD_BYTES = 32 << 10  # enough lines to keep an engine busy


@dataclass(frozen=True, slots=True)
class InputShard:
    """A contiguous part of one input file.

    lines_before_in_file, lines_before: lines in front of the shard, in its file and in all files. lines: all
    lines of the shard. samples: lines that are not blank.
    """

    part: FilePart
    lines_before_in_file: int
    lines_before: int
    lines: int
    samples: int

    def read(self, after: int = 0) -> Iterator[InputLine]:
        """Non-blank lines whose number is greater than `after`."""
        if self.lines_before + self.lines <= after:
            return
        for count, line in enumerate(read_lines(self.part), start=1):
            number = self.lines_before + count
            if number > after and not is_blank(line):
                yield InputLine(number, self.part.file, self.lines_before_in_file + count, line)


@dataclass(slots=True)
class InputDataset:
    """All input files.

    fingerprint: first 12 hex digits of the SHA-256 over all lines and shard boundaries; independent of paths.
    """

    shards: list[InputShard] = field(default_factory=list)
    fingerprint: str = ""

    def read(self, after: int = 0) -> Iterator[InputLine]:
        """Non-blank lines whose number is greater than `after`, in order."""
        for shard in self.shards:
            yield from shard.read(after)

    def count(self, after: int = 0) -> int:
        """Number of lines that `read` yields."""
        return sum(
            shard.samples if shard.lines_before >= after else sum(1 for _ in shard.read(after))
            for shard in self.shards
        )


def open_dataset(data_path: str, output: Path | None) -> InputDataset:
    """Scan the files of `data_path`, except those at or below `output`.

    Raises UserError if `data_path` matches no file.
    """
    files = find_files(data_path)
    if output is not None:
        files = [file for file in files if not Path(file).resolve().is_relative_to(output.resolve())]
    return scan_files(files)


def scan_files(files: Sequence[str]) -> InputDataset:
    """Read all files once, to count their lines and to compute the fingerprint."""
    dataset, digest = InputDataset(), hashlib.sha256()
    lines_before = lines_before_in_file = 0
    file = ""
    for part in _split(file_parts(files)):
        lines_before_in_file = lines_before_in_file if part.file == file else 0
        file = part.file
        digest.update(repr((is_text_file(file), part.start, part.end)).encode())
        lines = samples = 0
        for line in read_lines(part):
            digest.update(b"\n" + (line.raw if line.raw is not None else repr(line.value).encode()))
            lines, samples = lines + 1, samples + (not is_blank(line))
        dataset.shards.append(InputShard(part, lines_before_in_file, lines_before, lines, samples))
        lines_before, lines_before_in_file = lines_before + lines, lines_before_in_file + lines
    dataset.fingerprint = digest.hexdigest()[:12]
    return dataset


def _split(parts: Sequence[FilePart]) -> Iterator[FilePart]:
    """Split parts into shards. The shards depend on the files alone, not on the number of workers."""
    divisible_bytes = sum(part.end - part.start for part in parts if FileFormat.of(part.file).is_divisible)
    shard_bytes = max(divisible_bytes // _TARGET_SHARDS, _MIN_SHARD_BYTES)
    for part in parts:
        step = shard_bytes if FileFormat.of(part.file).is_divisible else part.end - part.start
        for start in range(part.start, part.end, step):
            yield FilePart(part.file, start, min(start + step, part.end))
