"""The outputs of docs/mistakes.md are current.

Mistakes that fail at once are made here; of slow ones, the part that produces the message.
"""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from filelock import FileLock

from parallelmind import cli
from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from tools.mistakes import MISTAKES, PAGE, Mistake, Outcome, outcome, prepare, row, run_mistake
from workloads.common.devices import Gpus, decide_training
from workloads.common.read_config import read_config
from workloads.train.run_dir import RunDir

NAMED = {mistake.name: mistake for mistake in MISTAKES}
ROWS = {
    line.split("|")[1].strip(): line
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    prepare(folder)
    return folder


@pytest.fixture
def folder(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(prepared)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # cli.run replaces it
    return prepared


def run_in_process(
    mistake: Mistake, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Outcome:
    """Run the command of a mistake in this process."""
    _, _, module, *words = shlex.split(mistake.command)
    monkeypatch.setattr(sys, "argv", [module, *words])
    main = import_module(f"{module}.__main__").main
    with mistake.around(folder), pytest.raises(SystemExit) as exit_info:
        cli.run(main)
    assert isinstance(exit_info.value.code, int)
    return outcome(exit_info.value.code, capsys.readouterr().err, folder)


def as_reported(error: UserError, folder: Path) -> Outcome:
    """Return the outcome that `cli.run` makes of an error."""
    return outcome(2, f"error: {error}", folder)


@pytest.mark.parametrize("name", ["wrong path", "wrong format", "wrong adapter", "port taken"])
def test_immediate_errors(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert row(NAMED[name], run_in_process(NAMED[name], folder, capsys, monkeypatch)) == ROWS[name], (
        "run make docs"
    )


def test_two_runs_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake = Mistake("two runs at once", NAMED["two runs at once"].command)
    config = decide_training(read_config(TrainConfig, shlex.split(mistake.command)[3:]))
    run_folder = RunDir.of(config).path.local
    run_folder.mkdir(parents=True)
    with FileLock(run_folder / ".lock"):
        assert row(mistake, run_in_process(mistake, folder, capsys, monkeypatch)) == ROWS[mistake.name], (
            "run make docs"
        )


def test_no_gpu(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        Gpus(0, native_bfloat16=False).decide(True, "auto")
    assert row(NAMED["no GPU"], as_reported(error.value, folder)) == ROWS["no GPU"], "run make docs"


def test_old_python(folder: Path) -> None:
    assert row(NAMED["old Python"], run_mistake(NAMED["old Python"], folder)) == ROWS["old Python"], (
        "run make docs"
    )


def test_every_error_is_one_line_with_a_remedy() -> None:
    """Ctrl-C is no error, and the line of `make` has another form."""
    assert [name for name in ROWS if name in NAMED] == list(NAMED)
    for name in NAMED.keys() - {"Ctrl-C", "old Python"}:
        (line,) = re.findall(r"`+ ?error: [^|]+", ROWS[name])
        assert re.fullmatch(r"`+ ?error: \w+(=\S+)?: .+; .+", line), line
