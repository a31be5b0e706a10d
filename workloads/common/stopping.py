"""Ctrl-C and SIGTERM as a request to save and end, and the file that carries it to whoever trains."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from parallelmind.errors import UserError
from parallelmind.remote import RemotePath

T = TypeVar("T")

_LOOK_EVERY_S = 1.0  # for a file at a URI


class StopFile:
    """A file in a run's folder that asks it to stop: who writes it need not know who trains, or where."""

    def __init__(self, file: RemotePath) -> None:
        self._file = file
        self._looking: Future[bool] | None = None

    def request(self) -> None:
        self._file.local.parent.mkdir(
            parents=True, exist_ok=True
        )  # a run at a URI may never have been on this machine
        self._file.local.touch()
        self._file.upload()

    def clear(self) -> None:
        self._file.local.unlink(missing_ok=True)
        self._file.delete_remote()

    def is_requested(self) -> bool:
        """Without waiting: at a URI the file is looked for beside the training."""
        if self._file.uri is None:
            return self._file.local.exists()
        before = self._looking
        if before is None or before.done():
            thread = ThreadPoolExecutor(1)
            self._looking = thread.submit(self._look)
            thread.shutdown(wait=False)
        return before is not None and before.done() and before.result()

    def _look(self) -> bool:
        time.sleep(_LOOK_EVERY_S)
        try:
            return self._file.read_bytes() is not None
        # out of reach for a moment: what is trained is worth more than the wish, which is looked for again
        except UserError:
            return False


def run_stoppable(work: Callable[[], T], stop: Callable[[], None], told: str) -> T:
    """Run `work` in a thread (so that Ray leaves our signal handlers alone). The first Ctrl-C or SIGTERM
    calls `stop` and prints `told`, a second one ends at once.
    """
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
