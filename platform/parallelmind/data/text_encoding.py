"""Text that is not UTF-8: recognise its encoding, and read it as UTF-8."""

from __future__ import annotations

import codecs
import io
import re
from typing import BinaryIO, cast

SAMPLE_BYTES = 1 << 16  # enough to guess an encoding by
_MARKS = (  # UTF-32 first: its mark starts with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8"),
)
_PIECE_BYTES = 1 << 16
_HIGH_BYTE = re.compile(rb"[\x80-\xff]")
_LONE_HIGH_BYTE = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])")
_UNDECODABLE = "parallelmind.undecodable"

# A byte that is undecodable becomes one that is no UTF-8, so that its line is recognised as bad.
codecs.register_error(_UNDECODABLE, lambda error: ("\udcff", cast(UnicodeDecodeError, error).end))


def marked_encoding(start: bytes) -> str | None:
    """The encoding that the byte order mark at the start of a text names, or None without a mark."""
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)


def likely_encoding(sample: bytes) -> str | None:
    """The encoding that a text may have which is not UTF-8, or None. A guess, to be named to the user."""
    if b"\0" in sample:
        return _likely_utf16(sample)
    high, lone = len(_HIGH_BYTE.findall(sample)), len(_LONE_HIGH_BYTE.findall(sample))
    valid = len(_HIGH_BYTE.findall(sample.decode("utf-8", errors="ignore").encode()))
    if 2 * valid > high:  # UTF-8 with a few damaged bytes
        return None
    if 2 * lone > high:  # accents between ASCII letters
        return "cp1252"
    from charset_normalizer import from_bytes

    match = from_bytes(sample).best()
    return match.encoding if match else None


def _likely_utf16(sample: bytes) -> str | None:
    """UTF-16 with one of the two byte orders, or None if the NUL bytes are not in alternate places."""
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if max(even, odd) < 8 * min(even, odd):
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def as_utf8(stream: BinaryIO, encoding: str) -> BinaryIO:
    """A stream of text in some encoding as a stream of UTF-8. Undecodable bytes become invalid UTF-8."""
    return cast(BinaryIO, io.BufferedReader(_Transcoder(stream, encoding)))


class _Transcoder(io.RawIOBase):
    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(_UNDECODABLE)
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        piece = b"-"
        while piece and not self._pending:
            piece = self._stream.read(_PIECE_BYTES)
            text = self._decoder.decode(piece, final=not piece)
            self._pending = text.encode("utf-8", errors="surrogateescape")
        length = min(len(buffer), len(self._pending))
        buffer[:length], self._pending = self._pending[:length], self._pending[length:]
        return length
