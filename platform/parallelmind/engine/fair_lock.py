"""A reentrant lock that a thread which takes it in a loop does not keep from the threads that wait for it."""

from __future__ import annotations

from threading import Lock, get_ident


class FairLock:
    """Reentrant lock as a context manager; a thread that releases it does not overtake one that waits.

    Python's own locks go to whichever thread asks first after a release, which is the thread that runs.
    """

    def __init__(self) -> None:
        self._lock, self._next = Lock(), Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner != get_ident():
            with self._next:  # the first thread that waits holds it
                self._lock.acquire()
            self._owner = get_ident()
        self._depth += 1

    def give_way(self) -> bool:
        """Let a waiting thread take the lock, which this thread holds, and take it again after that.

        Returns whether there was one. Does nothing where calls belong together: while the lock is held more
        than once.
        """
        if self._depth != 1 or not self._next.locked():
            return False
        self.__exit__()
        self.__enter__()
        return True

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
