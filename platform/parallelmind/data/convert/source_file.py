"""The text of a source file, in whatever encoding it is, and why a line of it has none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import pyarrow as pa

from parallelmind.data.files import FileFormat, FilePart, file_parts, open_file
from parallelmind.data.lines import DAMAGE, Line, decompress, read_lines
from parallelmind.data.text_encoding import SAMPLE_BYTES, as_utf8, likely_encoding, marked_encoding
from parallelmind.errors import UserError, first_line

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SourceFile:
    """A file of text or rows.

    encoding: of text; None is UTF-8. A byte order mark in the file counts more.
    """

    path: str
    encoding: str | None = None

    def numbered_lines(self) -> Iterator[tuple[int, Line]]:
        """All lines, counted from 1, with text as UTF-8. Raises UserError if the file cannot be read."""
        try:
            encoding = None if self._is_utf8 else self._encoding
            parts = file_parts([self.path]) if self._is_utf8 else [FilePart(self.path, 0, 0)]
            yield from enumerate(chain.from_iterable(read_lines(part, encoding) for part in parts), start=1)
        except UnicodeError as error:  # of an encoding that is no text encoding, or that needs a mark
            raise UserError(
                f"data_path={self.path}: cannot be read as {self._encoding} ({first_line(error)}); "
                "set encoding to that of the file"
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"data_path={self.path}: cannot be read ({first_line(error)}); "
                "check that its format matches its name"
            ) from error

    def decode(self, line: Line) -> str:
        """The text of a line. Raises ValueError with the reason if it has none."""
        if line.raw is None:
            raise ValueError(line.problem)
        try:
            text = without_mark(line).removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte {error.start} " if self._is_utf8 else ""
            raise ValueError(f"{where}{self.undecodable}") from error
        if "\0" in text:
            raise ValueError(self.undecodable)
        return text

    def read(self) -> str:
        """The whole text. Raises `DAMAGE`, and ValueError for text in another encoding."""
        with open_file(self.path) as stream:
            text = decompress(stream, FileFormat.of(self.path).compression)
            raw = (text if self._is_utf8 else as_utf8(text, self._encoding)).read()
        try:
            return raw.removeprefix(_BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(self.undecodable) from error

    @cached_property
    def undecodable(self) -> str:
        """Why some text of this file cannot be decoded, and a remedy."""
        if not self._is_utf8:
            return f"is not {self._encoding}; set encoding to that of the file"
        guess = likely_encoding(self._start)
        return f"is not UTF-8; the file may be {guess}: set encoding={guess}" if guess else "is not UTF-8"

    @cached_property
    def _encoding(self) -> str:
        return marked_encoding(self._start) or self.encoding or "utf-8"

    @property
    def _is_utf8(self) -> bool:
        return self._encoding == "utf-8"

    @cached_property
    def _start(self) -> bytes:
        """The first bytes of the decompressed file; none if it is damaged, which `numbered_lines` reports."""
        with open_file(self.path) as stream:
            try:
                return decompress(stream, FileFormat.of(self.path).compression).read(SAMPLE_BYTES)
            except DAMAGE:
                return b""


def without_mark(line: Line) -> bytes:
    """The bytes of a line, without the byte order mark of UTF-8; joined files have several."""
    assert line.raw is not None
    return line.raw.removeprefix(_BOM)
