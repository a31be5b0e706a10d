"""Lines of the input files, and what each of them gives to continue."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

import parallelmind as pm
from parallelmind.data.files import FileFormat
from parallelmind.data.lines import Line
from parallelmind.data.record_parser import parse_line, parse_value
from parallelmind.data.records import RecordError
from parallelmind.engine.record_prompt import RecordPrompt


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

    def to_prompt(self, tokenizer: PreTrainedTokenizerBase) -> RecordPrompt:
        """What to continue. Raises RecordError if the line holds no sample."""
        if self.line.problem is not None:
            raise RecordError(self.line.problem)
        if self.line.raw is None:
            return RecordPrompt.of(parse_value(self.line.value), tokenizer)
        if is_text_file(self.file):
            return RecordPrompt(pm.Sample(branches=[_text(self.line.raw)]))
        return RecordPrompt.of(parse_line(self.line.raw), tokenizer)


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
