"""Check every line before training: count the records, list the bad lines, and draw a sample of records."""

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
from parallelmind.data.duplicates import RecordHashes, pack_hashes, record_hash
from parallelmind.data.files import FilePart
from parallelmind.data.forks import write_forks
from parallelmind.data.lines import Line, read_lines
from parallelmind.data.record_parser import parse_line, parse_value
from parallelmind.data.records import Record, RecordError
from parallelmind.errors import UserError
from parallelmind.fork_markers import ForkMarkers
from parallelmind.storage import atomic_file

SAMPLE_CHARACTERS = 1 << 20  # size of a survey's sample; a tokenizer needs about a second for it

_COUNTS = ("lines", "records", "branches", "reduces", "trees", "standalone")


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is not a record.

    offset: bytes into the (uncompressed) file, or the row number in Parquet. line: counted from 1, blank
    lines included.
    """

    file: str
    offset: int
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(slots=True)
class Survey:
    """Content of the files.

    lines: number of lines that are not blank; each is a record or bad. branches, reduces: at all depths.
    trees: number of records with nested branches or a reduce. standalone: number of standalone records.
    unknown_keys: number of records that have each unknown key. fingerprint: 12 hex digits of the SHA-256 of
    all lines, in order. sample: some records from all over the files in their order, or all of them if they
    are few. hashes: hashes of the records' content.
    """

    lines: int = 0
    records: int = 0
    branches: int = 0
    reduces: int = 0
    trees: int = 0
    standalone: int = 0
    bad: list[BadLine] = field(default_factory=list)
    unknown_keys: Counter[str] = field(default_factory=Counter)
    fingerprint: str = ""
    sample: list[Record] = field(default_factory=list)
    hashes: RecordHashes = field(default_factory=RecordHashes)

    def raise_if_unusable(self, data: DataConfig, field: str, convert_fields: str = "") -> None:
        """Raise UserError if there is no good record, or more bad lines than the settings allow.

        field: the config field that names the files. convert_fields: of the command that converts them.
        """
        path = f"{field}={getattr(data, field)}"
        first_bad = f", the first: {self.bad[0]}" if self.bad else ""
        if not self.records:
            fields = convert_fields or f"data_path={getattr(data, field)} output_path=parallel.jsonl"
            raise UserError(
                f"{path}: holds no record (bad lines: {len(self.bad)}{first_bad}); "
                f"convert it to parallel JSONL with `python -m workloads.convert {fields}`"
            )
        if data.strict and self.bad:
            raise UserError(
                f"{path}: {self.bad[0]}; correct it, or set strict=false to skip bad lines ({len(self.bad)})"
            )
        limit = data.max_bad_records
        if limit is not None and len(self.bad) > (limit if limit >= 1 else limit * self.lines):
            share = f"{len(self.bad)} of {self.lines} lines are bad"
            raise UserError(
                f"max_bad_records={limit:g}: {share}{first_bad}; correct them, or raise the limit"
            )


def read_records(part: FilePart, data: DataConfig, vocab_size: int | None) -> Iterator[Record]:
    """Every good record of a part. Bad lines are skipped; `survey_part` reports them."""
    for line in read_lines(part):
        result = check_line(line, data, vocab_size)
        if isinstance(result, Record):
            yield result


def check_line(line: Line, data: DataConfig, vocab_size: int | None) -> Record | str | None:
    """The record in a line, the reason why it is bad, or None for a blank line."""
    if line.problem is not None:
        return line.problem
    if line.raw is not None and not line.raw.strip():
        return None
    try:
        if line.raw is not None:
            record = parse_line(line.raw, vocab_size)
        else:
            record = parse_value(line.value, vocab_size)
        if markers := ForkMarkers.of(data.fork_markers):
            write_forks(record, markers)
    except RecordError as error:
        return str(error)
    limit = data.max_branches_per_sample
    if data.overfull == "refuse" and (given := record.tree.limited_branches) > limit:
        return f"has {given} branches, more than max_branches_per_sample={limit}"
    return record


def survey_part(
    part: FilePart, data: DataConfig, vocab_size: int | None, share: float = 0.0, hash_share: float = 1.0
) -> dict[str, Any]:
    """Counts, bad lines and sampled records of one part, as one row of plain values for `combine_surveys`.

    share: the share of records to sample; the first record is always sampled. The random draws depend on the
    file's name and the part, not on the file's folder. hash_share: as in `RecordHashes`. Line
    numbers count from 1 within the part.
    """
    counts: Counter[str] = Counter()
    unknown_keys: Counter[str] = Counter()
    bad: list[tuple[int, int, str]] = []
    sample: list[tuple[float, str]] = []
    hashes: list[int] = []
    random_draws = random.Random(f"{PurePosixPath(part.file).name} {part.start}")
    digest = hashlib.sha256()
    for number, line in enumerate(read_lines(part), start=1):
        counts["numbered"] = number
        digest.update(b"\n" + (line.raw if line.raw is not None else repr(line.value).encode()))
        result = check_line(line, data, vocab_size)
        if isinstance(result, Record):
            counts.update(lines=1, records=1, branches=result.num_branches, standalone=int(result.standalone))
            if not result.is_flat:
                counts.update(trees=1, reduces=result.num_reduces)
            unknown_keys.update(result.unknown_keys)
            hashes.append(record_hash(result))
            if (draw := random_draws.random()) < share or not sample:
                sample.append((draw, _json_text(line)))
        elif result is not None:
            counts["lines"] += 1
            bad.append((line.offset, number, result))
    row = {name: counts[name] for name in (*_COUNTS, "numbered")}
    lists = {"bad": json.dumps(bad), "unknown_keys": json.dumps(unknown_keys), "sample": json.dumps(sample)}
    return {**row, **lists, "digest": digest.hexdigest(), "hashes": pack_hashes(hashes, hash_share)}


def _json_text(line: Line) -> str:
    """The JSON of a good line. Unknown Parquet columns may hold values that JSON cannot represent."""
    if line.raw is not None:
        return line.raw.decode("utf-8-sig")
    return json.dumps(line.value, ensure_ascii=False, default=str)


def combine_surveys(
    parts: Sequence[FilePart], rows: Sequence[dict[str, Any]], hash_share: float = 1.0
) -> Survey:
    """One survey from the rows of `survey_part`, given in the order of the parts."""
    survey, lines_before, file = Survey(), 0, ""
    for part, row in zip(parts, rows, strict=True):
        lines_before = lines_before if part.file == file else 0
        file = part.file
        for name in _COUNTS:
            setattr(survey, name, getattr(survey, name) + row[name])
        survey.unknown_keys.update(json.loads(row["unknown_keys"]))
        survey.bad += [
            BadLine(file, offset, lines_before + number, reason)
            for offset, number, reason in json.loads(row["bad"])
        ]
        lines_before += row["numbered"]
    survey.hashes = RecordHashes.unpack(b"".join(row["hashes"] for row in rows), hash_share)
    survey.sample = _lowest_draws([(draw, text) for row in rows for draw, text in json.loads(row["sample"])])
    survey.fingerprint = hashlib.sha256("".join(row["digest"] for row in rows).encode()).hexdigest()[:12]
    return survey


def _lowest_draws(drawn: Sequence[tuple[float, str]]) -> list[Record]:
    """The records with the lowest draws, in file order: at least one, else up to `SAMPLE_CHARACTERS`.

    The result is distributed as if all records had been drawn with equal probability.
    """
    room = SAMPLE_CHARACTERS
    chosen: list[int] = []
    for index in sorted(range(len(drawn)), key=lambda index: drawn[index][0]):
        room -= len(drawn[index][1])
        if chosen and room < 0:
            break
        chosen.append(index)
    return [parse_value(json.loads(drawn[index][1])) for index in sorted(chosen)]


def write_quarantine(path: Path, bad: Sequence[BadLine]) -> None:
    """Write one JSON object per bad line: file, offset, line and reason."""
    lines = (
        json.dumps({"file": item.file, "offset": item.offset, "line": item.line, "reason": item.reason})
        for item in bad
    )
    with atomic_file(path) as file:
        file.writelines(f"{line}\n" for line in lines)
