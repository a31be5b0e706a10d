"""Write docs/reference.md: every field of every command, read from the configuration classes.

Usage: python -m tools.reference
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
from workloads.doctor.config import DoctorConfig
from workloads.evaluate.answers import AnswersConfig
from workloads.evaluate.attention import AttentionConfig
from workloads.evaluate.support import SupportConfig
from workloads.evaluate.tax import TaxConfig
from workloads.export import ExportConfig
from workloads.generate.config import GenerateConfig
from workloads.push import PushConfig
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
    "workloads.push": PushConfig,
    "workloads.doctor": DoctorConfig,
    "serving": ServerConfig,
}

_OPENING = """# Reference

All fields of all commands, as `--help` prints them. This page is written by `make docs`; do not edit it.

Set a field with `field=value` after the command, or in the configuration file of a run or sweep. `null`
unsets an optional field. Each command lists its own fields; fields that several commands share are in the
sections after the commands.
"""


def reference() -> str:
    """Return the whole page as Markdown."""
    users = _users()
    shared = [group for group, commands in users.items() if len(commands) > 1]
    sections = [
        _OPENING,
        "Commands: " + ", ".join(f"[`{name}`](#{anchor(name)})" for name in COMMANDS) + ".\n",
    ]
    sections += [_command(name, kind, shared) for name, kind in COMMANDS.items()]
    sections += [_section(cli.group_title(group), _used(users[group]), group) for group in shared]
    sections.append(
        _section("Between", "A range of values in `space` of a sweep, in place of a list.\n", Between)
    )
    return "\n".join(sections)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    kept = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return kept.strip().replace(" ", "-")


def _users() -> dict[type[FrozenConfig], list[str]]:
    """Return, for each class, the commands that have its fields."""
    users: dict[type[FrozenConfig], list[str]] = {}
    for name, kind in COMMANDS.items():
        for group in cli.field_groups(kind):
            users.setdefault(group, []).append(name)
    return users


def _command(name: str, kind: type[FrozenConfig], shared: Sequence[type[FrozenConfig]]) -> str:
    groups = cli.field_groups(kind)
    common = [
        f"[{cli.group_title(group)}](#{anchor(cli.group_title(group))})"
        for group in groups
        if group in shared
    ]
    inherited = f"Shared fields: {'; '.join(common)}.\n" if common else ""
    own = [group for group in groups if group not in shared]
    tables = [_table(groups[group]) for group in own]
    if len(own) > 1:
        tables = [f"{cli.group_title(group)}:\n\n{table}" for group, table in zip(own, tables, strict=True)]
    return "\n".join([f"## {name}\n", *([inherited] if inherited else []), *tables])


def _used(commands: Sequence[str]) -> str:
    return "Used by " + ", ".join(f"[`{name}`](#{anchor(name)})" for name in commands) + ".\n"


def _section(title: str, intro: str, group: type[FrozenConfig]) -> str:
    return "\n".join([f"## {title}\n", intro, _table(cli.field_groups(group)[group])])


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
