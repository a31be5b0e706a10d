"""What every command line of this project has in common: `key=value` fields, `--help`, one-line errors, exit
codes.
"""

from __future__ import annotations

import itertools
import json
import re
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
from typing import Any, NamedTuple, TypeVar

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from parallelmind.config import FrozenConfig, resolve
from parallelmind.errors import UserError, UserNotice

PartT = TypeVar("PartT", bound=FrozenConfig)
T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0
_MIN_MEANING_COLUMNS = 40
_REQUIRED = "required"

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line. A UserError becomes one line on stderr and exit 2; Ctrl-C is exit
    130.
    """
    warnings.formatwarning = _one_line
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


_formatted = warnings.formatwarning


def _one_line(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
    """Notices without the place in the code that they come from; other people's warnings as they are."""
    return (
        f"note: {message}\n"
        if issubclass(category, UserNotice)
        else _formatted(message, category, *place, **line)
    )


Tell = Callable[[int, Callable[[], str]], None]


@contextmanager
def progress(doing: str, total: int | None) -> Iterator[Tell]:
    """A function to call with the items done so far and a line about them: it moves a bar on a terminal, and
    elsewhere prints the line on stderr now and then, with the time left where the total is known.
    """
    if sys.stderr.isatty():
        columns = (
            TextColumn(doing),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, line: bar.update(task, completed=done, description=line())
        return
    started = told = time.monotonic()

    def tell(done: int, line: Callable[[], str]) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > _SECONDS_BETWEEN_LINES:
            told = now
            left = (
                f", {timedelta(seconds=round((now - started) / done * (total - done)))} left"
                if total and done
                else ""
            )
            print(f"{line()}{left}", file=sys.stderr, flush=True)

    yield tell


def tracked(items: Iterable[T], doing: str, total: int | None, line: Callable[[int], str]) -> Iterator[T]:
    """The items, with `progress`; line: of the items so far."""
    with progress(doing, total) as tell:
        for count, item in enumerate(items):
            tell(count, partial(line, count))
            yield item


def wants_help(argv: Sequence[str]) -> bool:
    return any(item in ("-h", "--help", "help") for item in argv)


def print_help(usage: str, kind: type[FrozenConfig]) -> None:
    """`usage` (a module's docstring, mostly) and every field of `kind`, on stdout."""
    print(f"{flowing(usage)}\n\nFields (key=value):\n{field_help(kind, _width())}")


def flowing(usage: str) -> str:
    """A docstring with its paragraphs as wide as the terminal; commands and lists, which are indented or
    aligned, stay.
    """
    found: list[str] = []
    for fixed, group in itertools.groupby(
        usage.strip().splitlines(), lambda line: not line or line[0] == " " or "   " in line
    ):
        lines = list(group)
        found += lines if fixed else textwrap.wrap(" ".join(lines), _width(), break_on_hyphens=False)
    return "\n".join(found)


def _width() -> int:
    """Columns of the terminal, or $COLUMNS; without either no line ends before its text does, so that grep
    finds all of it.
    """
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
    """`head` and a text whose further lines begin where it does, or six columns in."""
    indent = " " * max(6, len(head))
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)


def split_args(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positionals and `key=value` overrides, each in the order given; `--key=value` counts as `key=value`.

    Raises UserError for any other flag.
    """
    positionals, dotlist = [], []
    for item in argv:
        bare = item.removeprefix("--")
        if _OVERRIDE.match(bare):
            dotlist.append(bare)
        elif item.startswith("-") and item != "-":
            raise UserError(
                f"{item}: there are no flags; write {bare.lstrip('-') or 'key'}=VALUE, and --help lists the fields"
            )
        else:
            positionals.append(item)
    return positionals, dotlist


def parse(kind: type[PartT], argv: Sequence[str]) -> PartT:
    """The fields of a command that takes `key=value`, and `--key` for `key=true`. Raises UserError for
    anything else.
    """
    positionals, dotlist = split_args([switched(kind, item) for item in argv])
    if positionals:
        raise UserError(f"{positionals[0]}: not understood; write key=value, and --help lists the fields")
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
    """`int`, `str | null`, `low | mid | spread`, `list[int]`, `{str: int}`: what to write, in as few words as
    possible.
    """
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
