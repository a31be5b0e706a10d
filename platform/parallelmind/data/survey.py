"""Every line checked once before training: what is good, what is bad and why, and a sample of the good."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from parallelmind.config import DataConfig
from parallelmind.data.files import Part
from parallelmind.data.lines import Line, read_lines
from parallelmind.data.records import Record, RecordError, parse_line, parse_value
from parallelmind.errors import UserError

_CONVERT = "turn it into parallel JSONL with `python -m workloads.convert`"
_COUNTS = ("lines", "records", "branches", "lone")

SAMPLE = 1 << 20  # characters of records in a survey's sample: a second's work for a tokenizer


@dataclass(frozen=True, slots=True)
class BadLine:
    """offset: bytes into the (uncompressed) file, or the row's number in Parquet. line: from 1, blank lines
    included.
    """

    file: str
    offset: int
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(slots=True)
class Survey:
    """What the files hold. lines: that are not blank; each is a record or bad. lone: records that grouping
    will gather.

    extra: records by each key that means nothing here. fingerprint: 12 hex digits of the SHA-256 of all
    lines, in order. sample: records in their order, all of them where they are few, else some from
    everywhere.
    """

    lines: int = 0
    records: int = 0
    branches: int = 0
    lone: int = 0
    bad: list[BadLine] = field(default_factory=list)
    extra: Counter[str] = field(default_factory=Counter)
    fingerprint: str = ""
    sample: list[Record] = field(default_factory=list)

    def refuse_too_many(self, config: DataConfig, name: str) -> None:
        """Raises UserError without a single good record, and for more bad ones than the settings allow."""
        worst = f", the first: {self.bad[0]}" if self.bad else ""
        what = f"{name}={getattr(config, name)}"
        if not self.records:
            raise UserError(f"{what}: holds no record (bad lines: {len(self.bad)}{worst}); {_CONVERT}")
        if config.strict and self.bad:
            raise UserError(
                f"{what}: {self.bad[0]}; mend it, or set strict=false to leave out bad lines ({len(self.bad)})"
            )
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
        record = (
            parse_line(line.raw, vocab_size) if line.raw is not None else parse_value(line.value, vocab_size)
        )
    except RecordError as error:
        return str(error)
    limit = config.max_branches_per_sample
    if config.overfull == "refuse" and len(record.branches) > limit:
        return f"has {len(record.branches)} branches, more than max_branches_per_sample={limit}"
    return record


def survey_part(part: Part, config: DataConfig, vocab_size: int | None, share: float = 0.0) -> dict[str, Any]:
    """Counts and bad lines of one part, as one row of plain values; line numbers start at 1 within the part.

    share: of its records that go into the sample, beside the first. Each draws a number, the same one
    wherever the files lie.
    """
    counts: Counter[str] = Counter()
    extra: Counter[str] = Counter()
    bad: list[tuple[int, int, str]] = []
    sample: list[tuple[float, str]] = []
    draws = random.Random(f"{PurePosixPath(part.file).name} {part.start}")
    digest = hashlib.sha256()
    for number, line in enumerate(read_lines(part), start=1):
        counts["numbered"] = number
        digest.update(b"\n" + (line.raw if line.raw is not None else repr(line.value).encode()))
        found = check(line, config, vocab_size)
        if isinstance(found, Record):
            counts.update(lines=1, records=1, branches=len(found.branches), lone=int(found.lone))
            extra.update(found.extra)
            if (draw := draws.random()) < share or not sample:
                sample.append((draw, _text(line)))
        elif found is not None:
            counts["lines"] += 1
            bad.append((line.offset, number, found))
    row = {name: counts[name] for name in (*_COUNTS, "numbered")}
    lists = {"bad": json.dumps(bad), "extra": json.dumps(extra), "sample": json.dumps(sample)}
    return {**row, **lists, "digest": digest.hexdigest()}


def _text(line: Line) -> str:
    """The JSON of a good line. Columns that mean nothing here may hold what JSON lacks."""
    return (
        line.raw.decode("utf-8-sig")
        if line.raw is not None
        else json.dumps(line.value, ensure_ascii=False, default=str)
    )


def combine(parts: Sequence[Part], rows: Sequence[dict[str, Any]]) -> Survey:
    """One survey of the rows of `survey_part`, in the order of the parts."""
    found, before, file = Survey(), 0, ""
    for part, row in zip(parts, rows, strict=True):
        before = before if part.file == file else 0
        file = part.file
        for name in _COUNTS:
            setattr(found, name, getattr(found, name) + row[name])
        found.extra.update(json.loads(row["extra"]))
        found.bad += [
            BadLine(file, offset, before + number, why) for offset, number, why in json.loads(row["bad"])
        ]
        before += row["numbered"]
    found.sample = _sampled([(draw, text) for row in rows for draw, text in json.loads(row["sample"])])
    found.fingerprint = hashlib.sha256("".join(row["digest"] for row in rows).encode()).hexdigest()[:12]
    return found


def _sampled(drawn: Sequence[tuple[float, str]]) -> list[Record]:
    """In their order, the records with the lowest draws, as many as `SAMPLE` holds and one at least: as if
    drawn evenly.
    """
    room = SAMPLE
    chosen: list[int] = []
    for index in sorted(range(len(drawn)), key=lambda index: drawn[index][0]):
        room -= len(drawn[index][1])
        if chosen and room < 0:
            break
        chosen.append(index)
    return [parse_value(json.loads(drawn[index][1])) for index in sorted(chosen)]


def write_quarantine(path: Path, bad: Sequence[BadLine]) -> None:
    """One JSON object for each bad line: file, offset, line and reason."""
    lines = (
        json.dumps({"file": item.file, "offset": item.offset, "line": item.line, "reason": item.reason})
        for item in bad
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
