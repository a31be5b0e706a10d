"""Counters of a generation run, its progress line and its final report."""

from __future__ import annotations

import sys
import time

from parallelmind.errors import UserError


class ProgressStats:
    """Lines and tokens of a run so far. `total` is the number of lines that the run has to process."""

    def __init__(self, total: int) -> None:
        self.total, self.samples, self.tokens = total, 0, 0
        self.skipped, self.first_skip = 0, ""
        self.empty = 0  # outputs that the model ended without any text
        self._started = time.monotonic()

    @property
    def processed(self) -> int:
        """Lines that were either continued or skipped."""
        return self.samples + self.skipped

    def report_skip(self, location: str, reason: str) -> None:
        """Count a skipped line and report it on stderr."""
        self.skipped += 1
        self.first_skip = self.first_skip or f"{location}: {reason}"
        print(f"skipped {location}: {reason}", file=sys.stderr)

    def progress_line(self) -> str:
        seconds = max(self._elapsed(), 1e-9)
        return (
            f"{self.processed} of {self.total} lines, "
            f"{self.processed / seconds:.2f} lines/s, {self.tokens / seconds:.1f} tokens/s"
        )

    def report_end(self, data_path: str, has_rows: bool) -> None:
        """Report the totals on stderr. Raises UserError if the output holds no row (`has_rows` is false)."""
        if self.skipped:
            print(f"skipped {self.skipped} of {self.total} lines", file=sys.stderr)
        if not has_rows:
            skipped = f" ({self.skipped} lines skipped, the first: {self.first_skip})" if self.skipped else ""
            raise UserError(
                f"data_path={data_path}: holds no usable line{skipped}; write one sample per line"
            )
        print(throughput(self.samples, self.tokens, self._elapsed()), file=sys.stderr)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started


def throughput(samples: int, tokens: int, seconds: float) -> str:
    """Totals and rate of a finished run, as one line."""
    return (
        f"{samples} samples, {tokens} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.1f} tokens/s"
    )
