"""The server's log: lines on stderr, where Ray collects them, each with the id of its request.

Lines never hold API keys or passwords in URIs, and hold prompts only with `log_prompts`.
"""

from __future__ import annotations

import logging
import sys

from asgi_correlation_id import CorrelationIdFilter

from parallelmind.redaction import redact_uri

log = logging.getLogger("parallelmind.serving")


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact_uri(super().format(record))


def configure_log(level: str) -> None:
    """Configure the log of this process. Call it once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(CorrelationIdFilter(default_value="-"))
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(correlation_id)s %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level.upper())
    # This logger warns about every replaced request id, so clients could fill the log.
    logging.getLogger("asgi_correlation_id").setLevel(logging.ERROR)
