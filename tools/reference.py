"""docs/reference.md: every field of every command, from the configurations themselves.

python -m tools.reference
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parallelmind import cli
from parallelmind.config import FrozenConfig, TrainConfig
from parallelmind.storage import atomic_file
from serving.config import ServerConfig
from workloads.chat import ChatConfig
from workloads.data.convert import ConvertConfig
from workloads.data.inspect import InspectConfig
from workloads.doctor.local_checks import DoctorConfig
from workloads.evaluate.answers import AnswersConfig
from workloads.evaluate.attention import AttentionConfig
from workloads.evaluate.support import SupportConfig
from workloads.evaluate.tax import TaxConfig
from workloads.export import ExportConfig
from workloads.generate.config import GenerateConfig
from workloads.sweep.config import Between, SweepConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"

COMMANDS: dict[str, type[FrozenConfig]] = {
    "workloads.train": TrainConfig,
    "workloads.sweep": SweepConfig,
    "workloads.evaluate answers": AnswersConfig,
    "workloads.evaluate tax": TaxConfig,
    "workloads.evaluate attention": AttentionConfig,
    "workloads.evaluate support": SupportConfig,
    "workloads.generate": GenerateConfig,
    "workloads.chat": ChatConfig,
    "workloads.convert": ConvertConfig,
    "workloads.convert --inspect": InspectConfig,
    "workloads.export": ExportConfig,
    "workloads.doctor": DoctorConfig,
    "serving": ServerConfig,
}

_OPENING = """# Reference

Every field of every command, as `--help` prints them. Written by `make docs`; do not edit.

A field is set by `field=value` after the command, or in the file that a run or a sweep is given. `null` switches an optional
field off. Fields that several commands have in common stand together below; a command lists what is its own.
"""


def reference() -> str:
    """The whole page."""
    users = _users()
    shared = [group for group, commands in users.items() if len(commands) > 1]
    sections = [
        _OPENING,
        "Commands: " + ", ".join(f"[`{name}`](#{anchor(name)})" for name in COMMANDS) + ".\n",
    ]
    sections += [_command(name, kind, shared) for name, kind in COMMANDS.items()]
    sections += [_section(_title(group), _used(users[group]), group) for group in shared]
    sections.append(_section("Between", "What `space` of a sweep may hold in place of a list.\n", Between))
    return "\n".join(sections)


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    kept = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return kept.strip().replace(" ", "-")


def groups(kind: type[FrozenConfig]) -> list[type[FrozenConfig]]:
    """The classes that a configuration's fields were written in, in the order of its fields."""
    owners = (
        next(each for each in kind.__mro__ if name in vars(each).get("__annotations__", {}))
        for name in kind.model_fields
    )
    return list(dict.fromkeys(owners))


def _users() -> dict[type[FrozenConfig], list[str]]:
    """Which commands have the fields of each class."""
    found: dict[type[FrozenConfig], list[str]] = {}
    for name, kind in COMMANDS.items():
        for group in groups(kind):
            found.setdefault(group, []).append(name)
    return found


def _title(group: type[FrozenConfig]) -> str:
    return (group.__doc__ or "").partition(";")[0].splitlines()[0].partition(". ")[0].removesuffix(".")


def _command(name: str, kind: type[FrozenConfig], shared: Sequence[type[FrozenConfig]]) -> str:
    found = groups(kind)
    common = [f"[{_title(group)}](#{anchor(_title(group))})" for group in found if group in shared]
    told = f"Takes the fields of: {'; '.join(common)}.\n" if common else ""
    own = [group for group in found if group not in shared]
    tables = [_table(_texts(group, kind)) for group in own]
    if len(own) > 1:
        tables = [f"{_title(group)}:\n\n{table}" for group, table in zip(own, tables, strict=True)]
    return "\n".join([f"## {name}\n", *([told] if told else []), *tables])


def _used(commands: Sequence[str]) -> str:
    return "Of " + ", ".join(f"[`{name}`](#{anchor(name)})" for name in commands) + ".\n"


def _section(title: str, told: str, group: type[FrozenConfig]) -> str:
    return "\n".join([f"## {title}\n", told, _table(_texts(group, group))])


def _texts(group: type[FrozenConfig], kind: type[FrozenConfig]) -> list[cli.FieldText]:
    """The fields that `group` has written, as `kind` has them."""
    return [text for text in cli.field_texts(kind) if text.name in vars(group).get("__annotations__", {})]


def _table(texts: Sequence[cli.FieldText]) -> str:
    rows = [
        f"| `{text.name}` | {_cell(text.kind)} | {_cell(text.default)} | {_plain(text.meaning)} |"
        for text in texts
    ]
    return "\n".join(["| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


def _cell(text: str) -> str:
    return "required" if text == "required" else f"`{_plain(text)}`"


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    with atomic_file(PAGE) as page:
        page.write(reference())
    print(PAGE)
