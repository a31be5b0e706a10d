"""Progress on stderr of work of more than five seconds: bars with the time left, or the time so far."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

DELAY_S = 5.0  # work that takes less shows nothing
LINE_S = 10.0  # between two lines


class DelayedBar(tqdm):
    """A bar that other libraries advance; where stderr is no terminal, a line now and then.

    It appears after `DELAY_S`, and only in the first of several training workers.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        is_terminal = sys.stderr.isatty()
        options.pop("name", None)  # of the hub's own class
        settings = {
            "file": sys.stderr,
            "delay": DELAY_S,
            "leave": False,
            "mininterval": 0.2 if is_terminal else LINE_S,
            "bar_format": None if is_terminal else "{desc}: {percentage:.0f}%, {remaining} left",
            "disable": os.environ.get("RANK", "0") != "0",
        }
        super().__init__(*args, **{**options, **settings})

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What shows the bar: in place on a terminal, as a line of its own elsewhere."""
        if file.isatty():
            in_place: Callable[[str], None] = tqdm.status_printer(file)
            return in_place
        return lambda text: print(text, file=file, flush=True) if text.strip() else None

    def close(self) -> None:
        """End the bar, and erase it from a terminal; lines stay as they are."""
        if not sys.stderr.isatty():
            self.sp = None
        super().close()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Print now and then how long the work within the context has taken, where its end is not known."""
    ended = Event()
    thread = Thread(target=_print_time, args=(what, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _print_time(what: str, ended: Event) -> None:
    started, seconds = time.monotonic(), DELAY_S
    while not ended.wait(seconds):
        print(f"{what}: {time.monotonic() - started:.0f} s so far", file=sys.stderr, flush=True)
        seconds = LINE_S
