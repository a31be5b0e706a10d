"""Every line checked once before training: what is good, what is bad and why, and about how much work it will be."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallelmind.config import DataConfig
from parallelmind.data.files import Part
from parallelmind.data.lines import Line, read_lines
from parallelmind.data.records import Record, RecordError, parse_line, parse_value
from parallelmind.errors import UserError

_CONVERT = "turn it into parallel JSONL with `python -m workloads.convert`"
_COUNTS = ("lines", "records", "branches", "lone", "bytes")


@dataclass(frozen=True, slots=True)
class BadLine:
    """offset: bytes into the (uncompressed) file, or the row's number in Parquet. line: from 1, blank lines included."""

    file: str
    offset: int
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(slots=True)
class Survey:
    """What the files hold. lines: that are not blank; each is a record or bad. lone: records that grouping will gather.

    bytes: of all records, from which the number of tokens is guessed. extra: records by each key that means nothing here.
    fingerprint: 12 hex digits of the SHA-256 of all lines, in order.
    """

    lines: int = 0
    records: int = 0
    branches: int = 0
    lone: int = 0
    bytes: int = 0
    bad: list[BadLine] = field(default_factory=list)
    extra: Counter[str] = field(default_factory=Counter)
    fingerprint: str = ""

    def batches(self, config: DataConfig) -> float:
        """About how many batches an epoch holds, before anything is skipped or split for its length."""
        if config.batch_tokens is not None:
            return self.bytes / 4 / config.batch_tokens
        if not config.batch_by_samples:
            return self.branches / config.batch_size
        mean = config.branches_per_sample or (config.min_branches_per_sample + config.max_branches_per_sample) / 2
        own = max(self.records - self.lone, (self.branches - self.lone) / config.max_branches_per_sample)
        return (self.lone / mean + own) / config.batch_size

    def refuse_too_many(self, config: DataConfig, name: str) -> None:
        """Raises UserError without a single good record, and for more bad ones than the settings allow."""
        worst = f", the first: {self.bad[0]}" if self.bad else ""
        what = f"{name}={getattr(config, name)}"
        if not self.records:
            raise UserError(f"{what}: holds no record (bad lines: {len(self.bad)}{worst}); {_CONVERT}")
        if config.strict and self.bad:
            raise UserError(f"{what}: {self.bad[0]}; mend it, or set strict=false to leave out bad lines ({len(self.bad)})")
        limit = config.max_bad_records
        if limit is not None and len(self.bad) > (limit if limit >= 1 else limit * self.lines):
            share = f"{len(self.bad)} of {self.lines} lines are bad"
            raise UserError(f"max_bad_records={limit:g}: {share}{worst}; mend them, or raise the limit")


def records(part: Part, config: DataConfig, vocab_size: int | None) -> Iterator[Record]:
    """Every good record of a part; `survey_part` tells of the others."""
    for line in read_lines(part):
        found = check(line, config, vocab_size)
        if isinstance(found, Record):
            yield found


def check(line: Line, config: DataConfig, vocab_size: int | None) -> Record | str | None:
    """The record in a line, the reason why there is none, or nothing for a blank line."""
    if line.problem is not None:
        return line.problem
    if line.raw is not None and not line.raw.strip():
        return None
    try:
        record = parse_line(line.raw, vocab_size) if line.raw is not None else parse_value(line.value, vocab_size)
    except RecordError as error:
        return str(error)
    limit = config.max_branches_per_sample
    if config.overfull == "refuse" and len(record.branches) > limit:
        return f"has {len(record.branches)} branches, more than max_branches_per_sample={limit}"
    return record


def survey_part(part: Part, config: DataConfig, vocab_size: int | None) -> dict[str, Any]:
    """Counts and bad lines of one part, as one row of plain values; line numbers start at 1 within the part."""
    counts: Counter[str] = Counter()
    extra: Counter[str] = Counter()
    bad: list[tuple[int, int, str]] = []
    digest = hashlib.sha256()
    for number, line in enumerate(read_lines(part), start=1):
        counts["numbered"] = number
        digest.update(b"\n" + (line.raw if line.raw is not None else repr(line.value).encode()))
        found = check(line, config, vocab_size)
        if isinstance(found, Record):
            counts.update(lines=1, records=1, branches=len(found.branches), lone=int(found.lone), bytes=len(line.raw or b""))
            extra.update(found.extra)
        elif found is not None:
            counts["lines"] += 1
            bad.append((line.offset, number, found))
    row = {name: counts[name] for name in (*_COUNTS, "numbered")}
    return {**row, "bad": json.dumps(bad), "extra": json.dumps(extra), "digest": digest.hexdigest()}


def combine(parts: Sequence[Part], rows: Sequence[dict[str, Any]]) -> Survey:
    """One survey of the rows of `survey_part`, in the order of the parts."""
    found, before, file = Survey(), 0, ""
    for part, row in zip(parts, rows, strict=True):
        before = before if part.file == file else 0
        file = part.file
        for name in _COUNTS:
            setattr(found, name, getattr(found, name) + row[name])
        found.extra.update(json.loads(row["extra"]))
        found.bad += [BadLine(file, offset, before + number, why) for offset, number, why in json.loads(row["bad"])]
        before += row["numbered"]
    found.fingerprint = hashlib.sha256("".join(row["digest"] for row in rows).encode()).hexdigest()[:12]
    return found


def write_quarantine(path: Path, bad: Sequence[BadLine]) -> None:
    """One JSON object for each bad line: file, offset, line and reason."""
    lines = (json.dumps({"file": item.file, "offset": item.offset, "line": item.line, "reason": item.reason}) for item in bad)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
