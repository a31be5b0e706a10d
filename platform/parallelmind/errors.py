"""Errors that a user can cause. Workloads turn them into exit 2 and one line; a server turns them into a
4xx.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """A wrong value, named in one line with its field and its remedy."""


class CapacityError(UserError):
    """Nothing is wrong with it, but there is no room now."""


class UserNotice(UserWarning):
    """Something that a user should know and need not mend; workloads print it as one line."""


def format_value(value: Any) -> str:
    """A value as one would type it after `field=`: true, false, null, and text bare unless it is empty or
    cannot be seen.
    """
    bare = isinstance(value, str) and value.isprintable() and value.strip() == value != ""
    return str(value) if bare else json.dumps(value, ensure_ascii=False, default=str)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_error(field: str, path: object, error: BaseException) -> UserError:
    """For a file or folder that the user has named."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(
        f"{field}={path}: cannot be written ({reason}); make room, or give another place that you may write to"
    )


@contextmanager
def translate_write_errors(field: str, path: object, *others: type[Exception]) -> Iterator[None]:
    """What keeps it from being written becomes one line. others: what a library raises in place of
    OSError.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except kinds as error:
        raise write_error(field, path, error) from error
