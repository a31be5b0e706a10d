"""Log lines of our own on stderr, where Ray collects them, each with its request's id. Never a key, and no
prompt unasked.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

log = logging.getLogger("parallelmind.serving")
request_id: ContextVar[str] = ContextVar("request_id", default="-")


class _Named(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request = request_id.get()
        return True


def set_up(level: str) -> None:
    """Call it once in a process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Named())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(request)s %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level.upper())
