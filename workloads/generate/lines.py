"""Lines of the input files, and the sample that each of them holds."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

import parallelmind as pm
from parallelmind.data.encode import encode_text
from parallelmind.data.files import FileFormat
from parallelmind.data.lines import Line
from parallelmind.data.records import Record, RecordError, Segment, parse_line, parse_value


@dataclass(frozen=True, slots=True)
class InputLine:
    """A non-blank line of the input.

    number: line number across all files, from 1. number_in_file: line number in `file`, from 1.
    """

    number: int
    file: str
    number_in_file: int
    line: Line

    @property
    def location(self) -> str:
        """FILE:LINE, for messages."""
        return f"{self.file}:{self.number_in_file}"

    def to_sample(self, tokenizer: PreTrainedTokenizerBase) -> pm.Sample:
        """The sample to continue. Raises RecordError if the line holds none."""
        if self.line.problem is not None:
            raise RecordError(self.line.problem)
        if self.line.raw is None:
            return prompt_sample(parse_value(self.line.value), tokenizer)
        if is_text_file(self.file):
            return pm.Sample(branches=[_text(self.line.raw)])
        return prompt_sample(parse_line(self.line.raw), tokenizer)


def prompt_sample(record: Record, tokenizer: PreTrainedTokenizerBase) -> pm.Sample:
    """The part of a record to continue: prompts without completions, and texts up to their first target."""
    prompts = [_prompt(branch, tokenizer, opens_sample=not record.main) for branch in record.branches]
    return pm.Sample(record.main, prompts)


def _prompt(branch: Segment, tokenizer: PreTrainedTokenizerBase, opens_sample: bool) -> str | list[int]:
    first_target = branch.targets[0][0] if branch.targets else None
    if branch.completion is not None or (first_target == 0 and not branch.rendered):
        return branch.body
    first = opens_sample and not branch.rendered
    ids = encode_text(tokenizer, branch.body, first) if isinstance(branch.body, str) else branch.body
    return ids[: first_target or None]


def _text(raw: bytes) -> str:
    if b"\0" in raw:
        raise RecordError("holds NUL bytes, as text in UTF-16 does; convert the file to UTF-8")
    try:
        return raw.decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError as error:
        raise RecordError(f"byte {error.start} is not UTF-8") from error


def is_text_file(file: str) -> bool:
    """Whether each line of the file is one plain prompt: .txt, compressed or not."""
    return FileFormat.of(file).suffix == ".txt"


def is_blank(line: Line) -> bool:
    return line.raw is not None and not line.raw.strip()
