"""Ctrl-C and SIGTERM as a request to save and end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def stoppable(work: Callable[[], T], stop: Callable[[], None], told: str) -> T:
    """Run `work` in a thread (so that Ray leaves our signal handlers alone). The first Ctrl-C or SIGTERM calls `stop` and
    prints `told`, a second one ends at once."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with _signals_to(stop, told):
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    if failed:
        raise failed[0]
    return done[0]


@contextmanager
def _signals_to(stop: Callable[[], None], told: str) -> Iterator[None]:
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        stop()
        print(f"{told}; once more ends at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
