"""A file that is there whole or not at all."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """UTF-8 text to write, compressed where `path` ends in .gz; at the end it is flushed and takes the name `path`.

    After an exception `path` is as it was. Raises OSError where the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(scratch, "wb") as file:
            # Without name and time in its header, the same records give the same bytes.
            packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.name.endswith(".gz") else file
            with io.TextIOWrapper(cast(BinaryIO, packed), encoding="utf-8", newline="\n") as text:
                yield text
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
