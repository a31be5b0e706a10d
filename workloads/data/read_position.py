"""How far this process has read its input files, whatever reads them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import accumulate

import psutil

from parallelmind.data.files import total_bytes
from parallelmind.remote import is_uri

_SECONDS_BETWEEN_LOOKS = 1.0


class ReadPosition:
    """Bytes as stored of files that are read one after another.

    total: of all files; None if they are not all on this machine.
    """

    def __init__(self, files: Sequence[str]) -> None:
        local = not any(map(is_uri, files))
        sizes = [total_bytes([file]) for file in files] if local else []
        self.total = sum(sizes) if local else None
        paths = map(os.path.realpath, files if local else ())
        self._starts = dict(zip(paths, accumulate(sizes, initial=0), strict=False))
        self._bytes, self._looked_at = 0, time.monotonic()

    def num_bytes(self) -> int:
        """Bytes up to the position in the file that is open, at most a second ago."""
        now = time.monotonic()
        if self._starts and now - self._looked_at >= _SECONDS_BETWEEN_LOOKS:
            self._looked_at = now
            for opened in psutil.Process().open_files():
                if opened.path in self._starts:
                    self._bytes = self._starts[opened.path] + opened.position
        return self._bytes
