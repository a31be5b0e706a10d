"""The command `parallelmind`: it lists, finds and runs the programs, and spells them as its user does."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from parallelmind import cli, programs
from parallelmind.errors import UserError
from workloads.__main__ import COMMANDS, run_command


def test_every_command_has_a_main_and_its_module_form() -> None:
    for name, (module, _) in COMMANDS.items():
        assert callable(import_module(module).main)
        assert name == "serve" or programs.find_spec(f"workloads.{name}")


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_without_a_name_the_commands_are_listed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run_command(argv)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-len(COMMANDS) :]] == list(COMMANDS)


def test_a_command_gets_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["export", "--help"])
    assert "lora_path" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"lora: unknown field"):
        run_command(["export", "lora=x"])


def test_an_unknown_command_is_answered() -> None:
    with pytest.raises(
        UserError, match=r"^trian: no such command \(did you mean train\?\); choose from train"
    ):
        run_command(["trian"])


def test_commands_are_spelled_as_the_user_types_them(monkeypatch: pytest.MonkeyPatch) -> None:
    text = ".venv/bin/python -m workloads.chat x, python -m serving y, `python -m workloads.convert`"
    monkeypatch.setattr(sys, "argv", ["/project/workloads/train/__main__.py"])
    assert cli.as_typed(text) == text
    monkeypatch.setattr(sys, "argv", ["/project/.venv/bin/parallelmind"])
    assert cli.as_typed(text) == "parallelmind chat x, parallelmind serve y, `parallelmind convert`"


def test_where_only_the_library_is_a_program_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^workloads.train: is not installed; run `make setup`"):
        programs.import_program("workloads.train")
