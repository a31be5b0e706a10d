"""The server's log: lines on stderr, where Ray collects them, each with the id of its request.

Lines never hold API keys, and hold prompts only with `log_prompts`.
"""

from __future__ import annotations

import logging
import sys

from asgi_correlation_id import CorrelationIdFilter

log = logging.getLogger("parallelmind.serving")


def configure_log(level: str) -> None:
    """Configure the log of this process. Call it once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(CorrelationIdFilter(default_value="-"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(correlation_id)s %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level.upper())
    # This logger warns about every replaced request id, so clients could fill the log.
    logging.getLogger("asgi_correlation_id").setLevel(logging.ERROR)
