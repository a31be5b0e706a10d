"""What `workloads.generate` continues: the lines of its files as one numbered sequence, cut for several
workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import parallelmind as pm
from parallelmind.data.encode import encode_text
from parallelmind.data.files import Part, file_parts
from parallelmind.data.lines import Line, read_lines
from parallelmind.data.records import Branch, Record, RecordError, parse_line, parse_value

_PACKED = (".gz", ".zst")
_WHOLE = (*_PACKED, ".parquet")
_STRETCHES = 64  # of plain files, about; fewer where they would be shorter than this
_SHORTEST = 32 << 10


@dataclass(frozen=True, slots=True)
class Entry:
    """A line that is not blank. number: from 1, through all files; in_file: the same within its own."""

    number: int
    file: str
    in_file: int
    line: Line

    @property
    def place(self) -> str:
        return f"{self.file}:{self.in_file}"

    def sample(self, tokenizer: Any) -> pm.Sample:
        """What there is to continue. Raises RecordError with the reason why there is nothing."""
        if self.line.problem is not None:
            raise RecordError(self.line.problem)
        if self.line.raw is None:
            return prompt_of(parse_value(self.line.value), tokenizer)
        if _is_text(self.file):
            return pm.Sample(branches=[self.line.raw.decode("utf-8", errors="replace").rstrip("\r")])
        return prompt_of(parse_line(self.line.raw), tokenizer)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a file. in_file, before: lines before it, of its file and of all; lines: its own; samples:
    those not blank.
    """

    part: Part
    in_file: int
    before: int
    lines: int
    samples: int

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """Its lines that are not blank and whose number is above `after`."""
        if self.before + self.lines <= after:
            return
        for count, line in enumerate(read_lines(self.part), start=1):
            if self.before + count > after and not _is_blank(line):
                yield Entry(self.before + count, self.part.file, self.in_file + count, line)


@dataclass(slots=True)
class Source:
    """All files. fingerprint: 12 hex digits of the SHA-256 of every line and of how they are cut; paths do
    not count.
    """

    stretches: list[Stretch] = field(default_factory=list)
    fingerprint: str = ""

    def entries(self, after: int = 0) -> Iterator[Entry]:
        for stretch in self.stretches:
            yield from stretch.entries(after)

    def samples(self, after: int = 0) -> int:
        """How many lines `entries` gives."""
        counts = (
            each.samples if each.before >= after else sum(1 for _ in each.entries(after))
            for each in self.stretches
        )
        return sum(counts)


def scan(files: Sequence[str]) -> Source:
    """Read everything once: how many lines there are, and what they say."""
    source, digest = Source(), hashlib.sha256()
    before = in_file = 0
    file = ""
    for part in _cut(file_parts(files)):
        in_file = in_file if part.file == file else 0
        file = part.file
        digest.update(repr((_is_text(file), part.start, part.end)).encode())
        lines = samples = 0
        for line in read_lines(part):
            digest.update(b"\n" + (line.raw if line.raw is not None else repr(line.value).encode()))
            lines, samples = lines + 1, samples + (not _is_blank(line))
        source.stretches.append(Stretch(part, in_file, before, lines, samples))
        before, in_file = before + lines, in_file + lines
    source.fingerprint = digest.hexdigest()[:12]
    return source


def _cut(parts: Sequence[Part]) -> Iterator[Part]:
    """The same stretches for the same files, however many workers share them; each is enough to keep an
    engine full.
    """
    size = max(
        sum(part.end - part.start for part in parts if not part.file.endswith(_WHOLE)) // _STRETCHES,
        _SHORTEST,
    )
    for part in parts:
        step = part.end - part.start if part.file.endswith(_WHOLE) else size
        for start in range(part.start, part.end, step):
            yield Part(part.file, start, min(start + step, part.end))


def prompt_of(record: Record, tokenizer: Any) -> pm.Sample:
    """What a record gives to continue: prompts without completions, texts up to their answer offset."""
    return pm.Sample(
        record.main, [_prompt(branch, tokenizer, first=not record.main) for branch in record.branches]
    )


def _prompt(branch: Branch, tokenizer: Any, first: bool) -> str | list[int]:
    if branch.completion is not None or branch.answer_offset == 0:
        return branch.body
    ids = encode_text(tokenizer, branch.body, first) if isinstance(branch.body, str) else branch.body
    return ids[: branch.answer_offset]


def _is_text(file: str) -> bool:
    """Whether its lines are prompts as they stand, packed or not."""
    packed = next((ending for ending in _PACKED if file.endswith(ending)), "")
    return file.removesuffix(packed).endswith(".txt")


def _is_blank(line: Line) -> bool:
    return line.raw is not None and not line.raw.strip()
