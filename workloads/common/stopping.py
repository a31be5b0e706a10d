"""Stop requests: Ctrl-C and SIGTERM in the driver, and a file that passes the request to the trainer."""

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

_POLL_S = 1.0  # between two polls for a file at a URI


class StopFile:
    """A file in a run's folder that asks the run to save a checkpoint and end.

    The process that writes the file need not know which process trains, or on which machine.
    """

    def __init__(self, file: RemotePath) -> None:
        self._file = file
        self._poll: Future[bool] | None = None

    def request(self) -> None:
        """Write the file."""
        # The folder of a run at a URI may not exist on this machine yet.
        self._file.local.parent.mkdir(parents=True, exist_ok=True)
        self._file.local.touch()
        self._file.upload()

    def clear(self) -> None:
        """Remove the file."""
        self._file.local.unlink(missing_ok=True)
        self._file.delete_remote()

    def is_requested(self) -> bool:
        """Whether the file exists. Does not block: at a URI it returns the result of the last poll."""
        if self._file.uri is None:
            return self._file.local.exists()
        previous = self._poll
        if previous is None or previous.done():
            executor = ThreadPoolExecutor(1)
            self._poll = executor.submit(self._poll_uri)
            executor.shutdown(wait=False)
        return previous is not None and previous.done() and previous.result()

    def _poll_uri(self) -> bool:
        time.sleep(_POLL_S)
        try:
            return self._file.read_bytes() is not None
        except UserError:  # temporarily unreachable: training continues until the next poll
            return False


def run_stoppable(work: Callable[[], T], request_stop: Callable[[], None], message: str) -> T:
    """Run `work` in a thread; the first Ctrl-C or SIGTERM calls `request_stop` and prints `message`.

    A second signal raises KeyboardInterrupt at once. The thread keeps Ray from replacing the signal handlers
    of the main thread. Returns what `work` returns, and raises what it raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with _handle_signals(request_stop, message):
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _handle_signals(request_stop: Callable[[], None], message: str) -> Iterator[None]:
    stopping = False

    def handle(number: int, frame: object) -> None:
        nonlocal stopping
        if stopping:
            raise KeyboardInterrupt
        stopping = True
        request_stop()
        print(f"{message}; a second signal ends at once", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
