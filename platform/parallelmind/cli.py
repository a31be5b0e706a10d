"""Command lines: `key=value` fields, `--help`, one-line errors, exit codes, progress."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import shutil
import sys
import textwrap
import time
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from parallelmind.config import FrozenConfig, resolve
from parallelmind.config.resolve import without_metadata
from parallelmind.crash_report import crash_report
from parallelmind.errors import UserError, UserNotice
from parallelmind.programs import is_installed
from parallelmind.progress import DELAY_S
from parallelmind.redaction import redact_uri

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)
T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0
_MIN_MEANING_COLUMNS = 40
_REQUIRED = "required"

_COMMAND = re.compile(r"(?:\.venv/bin/)?python -m (?:workloads\.(\w+)|serving\b)")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the arguments.

    A UserError and a file that this user may not open print one line and exit with 2. Ctrl-C exits with 130.
    If what reads the output has ended, as `head` does, it ends, too, with 141.
    Any other exception prints its last frames and exits with 1. It must not reach `sys.excepthook`: that of
    Ray calls the cluster, and blocks for a minute if the cluster is gone.
    """
    warnings.formatwarning = _one_line
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(as_typed(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except PermissionError as error:
        print(f"error: {error.filename}: {error.strerror}; give yourself access to it", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_ended():
            sys.exit(141)
        print(f"Traceback (last frames):\n{crash_report(error)}", file=sys.stderr, flush=True)
        sys.exit(1)


def _reader_has_ended() -> bool:
    """Whether nothing reads stdout any more; it is closed then, as Python would flush it at its end."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # an error is always told
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


_format_warning = warnings.formatwarning


def _one_line(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> str:
    """A UserNotice without its location in the code; any other warning in the usual format."""
    if issubclass(category, UserNotice):
        return as_typed(f"note: {redact_uri(str(message))}\n")
    return _format_warning(message, category, *args, **kwargs)


Advance = Callable[[int, Callable[[], str]], None]


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Advance]:
    """Show progress on stderr: after some seconds a bar on a terminal, elsewhere a line every few seconds.

    Yields a function that takes the number of items done and a function that returns a line about them. With
    `total` the time left is shown.
    """
    if not sys.stderr.isatty():
        yield _print_periodically(total)
        return
    columns = (
        TextColumn(description),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    bar, started = Progress(*columns, console=Console(stderr=True)), time.monotonic()
    task = bar.add_task("", total=total)

    def advance(done: int, line: Callable[[], str]) -> None:
        if time.monotonic() - started >= DELAY_S:
            bar.start()  # does nothing where it has started
            bar.update(task, completed=done, description=line())

    try:
        yield advance
    finally:
        bar.stop()


def _print_periodically(total: int | None) -> Advance:
    started = last_print = time.monotonic()

    def advance(done: int, line: Callable[[], str]) -> None:
        nonlocal last_print
        now = time.monotonic()
        if now - last_print <= _SECONDS_BETWEEN_LINES:
            return
        last_print = now
        left = ""
        if total and done:
            seconds = round((now - started) / done * (total - done))
            left = f", {timedelta(seconds=seconds)} left"
        print(f"{line()}{left}", file=sys.stderr, flush=True)

    return advance


def tracked(
    items: Iterable[T], description: str, total: int | None, line: Callable[[int], str]
) -> Iterator[T]:
    """Iterate over items with `progress`. line: returns the line for a number of items done."""
    with progress(description, total) as advance:
        for count, item in enumerate(items):
            advance(count, partial(line, count))
            yield item


def wants_help(argv: Sequence[str]) -> bool:
    return any(item in ("-h", "--help", "help") for item in argv)


def print_help(usage: str, kind: type[FrozenConfig]) -> None:
    """Print `usage`, normally a module's docstring, and every field of `kind`."""
    print(f"{flowing(as_typed(usage))}\n\nFields (key=value):\n{field_help(kind, _width())}")


def as_typed(text: str) -> str:
    """A text with its commands as this user types them: with `parallelmind` where that is the command."""
    if not (is_installed() or Path(sys.argv[0]).stem == "parallelmind"):
        return text
    return _COMMAND.sub(lambda match: f"parallelmind {match[1] or 'serve'}", text)


def flowing(usage: str) -> str:
    """A docstring with its paragraphs wrapped to the terminal; indented and aligned lines stay as is."""

    def is_fixed(line: str) -> bool:
        return not line or line.startswith(" ") or "   " in line

    flowed: list[str] = []
    for fixed, group in itertools.groupby(usage.strip().splitlines(), is_fixed):
        lines = list(group)
        flowed += lines if fixed else textwrap.wrap(" ".join(lines), _width(), break_on_hyphens=False)
    return "\n".join(flowed)


def _width() -> int:
    """Columns of the terminal, or $COLUMNS; otherwise unlimited, so that grep finds whole lines."""
    return shutil.get_terminal_size((sys.maxsize, 0)).columns


class FieldText(NamedTuple):
    """One field as `--help` and docs/reference.md describe it."""

    name: str
    kind: str
    default: str
    meaning: str

    @property
    def is_required(self) -> bool:
        return self.default == _REQUIRED


def field_texts(kind: type[FrozenConfig]) -> list[FieldText]:
    """Every flat field of `kind`, in the order of its groups."""
    return [
        FieldText(name, _type_name(field.annotation), _default(field), field.description or "")
        for name, field in kind.flat_fields().items()
    ]


def field_groups(kind: type[FrozenConfig]) -> dict[type[FrozenConfig], list[FieldText]]:
    """The fields of `kind` by the class that declares them."""
    owners = kind.field_owners()
    groups: dict[type[FrozenConfig], list[FieldText]] = {}
    for text in field_texts(kind):
        groups.setdefault(owners[text.name], []).append(text)
    return groups


def group_title(group: type[FrozenConfig]) -> str:
    """The first sentence of the docstring of a group, as its heading."""
    return (group.__doc__ or "").splitlines()[0].partition(". ")[0].removesuffix(".")


def field_help(kind: type[FrozenConfig], width: int = sys.maxsize) -> str:
    """The fields of `kind` under the headings of their groups, required fields first.

    Name, type, default and meaning stand in aligned columns; the meaning moves below them in a terminal that
    is too narrow.
    """
    groups = field_groups(kind)
    sections = {"Required": [text for text in field_texts(kind) if text.is_required]}
    for group, texts in groups.items():
        sections[group_title(group)] = [text for text in texts if not text.is_required]
    sections = {title: texts for title, texts in sections.items() if texts}
    sizes = [max((len(row[column]) for row in field_texts(kind)), default=0) for column in range(3)]
    lines: list[str] = []
    for title, texts in sections.items():
        lines += [f"\n{title}"] if lines else [title]
        lines += [line for text in texts for line in _field_lines(text, sizes, width)]
    return "\n".join(lines)


def _field_lines(text: FieldText, sizes: Sequence[int], width: int) -> list[str]:
    """A field in columns of the given sizes, or with its meaning below where that has too little room."""
    if width - sum(sizes) - 8 < _MIN_MEANING_COLUMNS:
        return [_hanging("  ".join(text[:3]), width, "  "), _hanging(text.meaning, width, " " * 6)]
    return [_hanging(text.meaning, width, "  ".join(["", *map(str.ljust, text[:3], sizes), ""]))]


def _hanging(text: str, width: int, head: str) -> str:
    """`head` and the text, wrapped with a hanging indent of the length of `head`, at least six columns."""
    indent = " " * max(6, len(head))
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)


def split_args(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into positionals and `key=value` overrides; `--key=value` counts as an override.

    Raises:
        UserError: any other flag.
    """
    positionals, dotlist = [], []
    for item in argv:
        bare = item.removeprefix("--")
        if _OVERRIDE.match(bare):
            dotlist.append(bare)
        elif item.startswith("-") and item != "-":
            raise UserError(
                f"{item}: there are no flags; write {bare.lstrip('-') or 'key'}=VALUE; "
                "--help lists the fields"
            )
        else:
            positionals.append(item)
    return positionals, dotlist


def parse(kind: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """The configuration of a command that takes `key=value` and, for `key=true`, `--key`.

    Raises:
        UserError: anything else.
    """
    positionals, dotlist = split_args([switched(kind, item) for item in argv])
    if positionals:
        raise UserError(f"{positionals[0]}: unknown argument; write key=value; --help lists the fields")
    return resolve(kind, {}, dotlist, source="command line")


def switched(kind: type[FrozenConfig], item: str) -> str:
    """`--key` of a bool field as `key=true`; any other item unchanged."""
    name = item.removeprefix("--")
    field = kind.flat_fields().get(name)
    is_switch = item.startswith("--") and field is not None and field.annotation is bool
    return f"{name}=true" if is_switch else item


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return _REQUIRED
    value: Any = field.get_default(call_default_factory=True)
    return str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _type_name(annotation: Any) -> str:
    """A short name of a type: `int`, `str | null`, `low | mid | spread`, `list[int]`, `{str: int}`."""
    annotation = without_metadata(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (list, tuple):
        return f"list[{_type_name(typing.get_args(annotation)[0])}]"
    if typing.get_origin(annotation) is dict:
        return f"{{{': '.join(map(_type_name, typing.get_args(annotation)))}}}"
    if annotation is Any:
        return "any"
    if arguments := typing.get_args(annotation):
        return " | ".join(_type_name(argument) for argument in arguments)
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
