"""The report of an exception that is no user error: its last frames and its message.

Pickling drops a traceback. `keep_traceback` keeps it as text; Ray keeps that of its tasks in the message.
Ray's attributes are read by name, so this module needs no Ray.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from parallelmind.errors import first_line
from parallelmind.redaction import redact_uri

_FRAMES, _MESSAGE_LINES = 5, 20
_CAUSE_ATTRIBUTES = ("_base_exc", "health_check_failure", "cause", "controller_failure")
_TRACEBACK_ATTRIBUTE = "remote_traceback"
_FRAME = '  File "'
_RAY_TASK = "ray::"  # in the line above the traceback of a task
_CHAINS = (  # between an exception and the one that replaced it
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)


@contextmanager
def keep_traceback() -> Iterator[None]:
    """Keep the traceback of an exception that is pickled on its way to another process.

    An exception that cannot be pickled becomes a RuntimeError with the same text.
    """
    try:
        yield
    except Exception as error:
        is_from_ray = root_cause(error) is not error  # Ray pickles its own wrappers
        kept = is_from_ray or _can_be_pickled(error)
        sent = error if kept else RuntimeError(f"{type(error).__name__}: {error}")
        setattr(sent, _TRACEBACK_ATTRIBUTE, traceback.format_exc())
        raise sent from (None if sent is error else error)


def _can_be_pickled(error: Exception) -> bool:
    try:
        copy.copy(error)  # calls what pickle calls
    except Exception:  # whatever the methods of the exception raise
        return False
    return True


def root_cause(error: BaseException) -> BaseException:
    """The exception inside Ray's wrappers; of several failed workers, that of the first."""
    return list(_unwrap(error))[-1]


def crash_report(error: BaseException) -> str:
    """The last frames of the process that raised the error, and its message, as Python prints them."""
    texts = ["".join(traceback.format_exception(error))]
    texts += [getattr(inner, _TRACEBACK_ATTRIBUTE, None) or str(inner) for inner in _unwrap(error)]
    return redact_uri(_last_frames([text for text in texts if _FRAME in text][-1]))


def crash_line(error: BaseException) -> str:
    """Type, message and place of the error in one line."""
    cause = root_cause(error)
    frames = [line for line in crash_report(error).splitlines() if line.startswith(_FRAME)]
    place = f" ({frames[-1].strip()})" if frames else ""
    return redact_uri(f"{type(cause).__name__}: {first_line(cause)}{place}")


def _unwrap(error: BaseException) -> Iterator[BaseException]:
    """The error and the errors inside it, the innermost last."""
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        failures = getattr(inner, "worker_failures", {}).values()
        wrapped = (getattr(inner, name, None) for name in _CAUSE_ATTRIBUTES)
        inner = next(filter(None, (*failures, *wrapped)), None)


def _last_frames(text: str) -> str:
    """The last frames of the last process that has any, and the first lines of the message below them."""
    lines = text.rstrip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith(_FRAME)]
    task = max((number for number in range(frames[-1]) if _RAY_TASK in lines[number]), default=-1)
    first = [number for number in frames if number > task][-_FRAMES:][0]
    end = next((number for number in range(frames[-1], len(lines)) if lines[number] in _CHAINS), len(lines))
    return "\n".join(lines[first : min(end, frames[-1] + _MESSAGE_LINES)]).rstrip()
