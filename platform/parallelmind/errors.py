"""Errors that a user can cause.

Workloads report them in one line and exit with 2; a server turns them into a 4xx response.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from parallelmind.redaction import redact_uri


class ShownInOneLine:
    """Errors that notebooks show in one line, as commands do."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of a traceback."""
        return [f"error: {self}"]


class UserError(ShownInOneLine, ValueError):
    """A wrong value. The message names the field, the value and the remedy in one line, without passwords."""

    def __init__(self, message: object) -> None:
        super().__init__(redact_uri(str(message)))


class DecodingError(ShownInOneLine, RuntimeError):
    """A branch could not be decoded to its end. The message names the branch and the reason in one line."""


class UserNotice(UserWarning):
    """Information that needs no correction. Workloads print it as one line."""


def format_value(value: Any) -> str:
    """A value as a user would type it after `field=`.

    JSON, except that text stands without quotes unless it is empty, not printable, or starts or ends with
    white space.
    """
    plain = isinstance(value, str) and value.isprintable() and value.strip() == value != ""
    return str(value) if plain else json.dumps(value, ensure_ascii=False, default=str)


def short_repr(value: Any) -> str:
    """A Python value in one line, shortened."""
    return " ".join(reprlib.repr(value).split())


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_error(field: str, path: object, error: BaseException) -> UserError:
    """The UserError for a file or folder, named by a config field, that cannot be written."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(
        f"{field}={path}: cannot be written ({reason}); make room, or give a path that you may write to"
    )


@contextmanager
def translate_read_errors(field: str, path: object) -> Iterator[None]:
    """Turn an OSError into a UserError that names the unreadable file or folder at or below `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(
            f"{field}={path}: {error.filename or path} cannot be read ({reason}); "
            "give yourself permission to read it, or give another path"
        ) from error


@contextmanager
def translate_write_errors(field: str, path: object, *library_errors: type[Exception]) -> Iterator[None]:
    """Turn an OSError into `write_error`. library_errors: types that a library raises instead of OSError."""
    error_types: tuple[type[Exception], ...] = (OSError, *library_errors)
    try:
        yield
    except error_types as error:
        raise write_error(field, path, error) from error
