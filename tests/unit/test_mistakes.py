"""What docs/mistakes.md says the program says, it says: of the mistakes that are made in a moment, and of
what they rest on.
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
from parallelmind.config import DataConfig, TrainConfig
from parallelmind.data.files import file_parts, find_files
from parallelmind.data.survey import combine, survey_part
from parallelmind.errors import UserError
from tools.mistakes import MISTAKES, PAGE, Mistake, Told, made, prepare, row, told
from workloads.common import resources
from workloads.common.read_config import read_config
from workloads.train.command import run_place

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
def place(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(prepared)
    monkeypatch.setattr(
        warnings, "formatwarning", warnings.formatwarning
    )  # a command line puts its own there
    return prepared


def said(
    mistake: Mistake, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Told:
    """What its command says and how it ends, in this process."""
    _, _, module, *words = shlex.split(mistake.command)
    monkeypatch.setattr(sys, "argv", [module, *words])
    main = import_module("serving.__main__" if module == "serving" else module).main
    with mistake.around(folder), pytest.raises(SystemExit) as end:
        cli.run(main)
    assert isinstance(end.value.code, int)
    return told(end.value.code, capsys.readouterr().err, folder)


def refusal(error: UserError, folder: Path) -> Told:
    """As `cli.run` tells it."""
    return told(2, f"error: {error}", folder)


@pytest.mark.parametrize("name", ["wrong path", "wrong adapter", "port taken"])
def test_what_is_refused_at_once(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert row(NAMED[name], said(NAMED[name], place, capsys, monkeypatch)) == ROWS[name], "run make docs"


def test_two_runs_at_once(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake = Mistake("two runs at once", NAMED["two runs at once"].command)
    folder = run_place(read_config(TrainConfig, shlex.split(mistake.command)[3:])).folder
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        assert row(mistake, said(mistake, place, capsys, monkeypatch)) == ROWS[mistake.name], "run make docs"


def test_wrong_format(place: Path) -> None:
    mistake = NAMED["wrong format"]
    config = read_config(TrainConfig, shlex.split(mistake.command)[3:]).part(DataConfig)
    parts = file_parts(find_files(config.data_path))
    with pytest.raises(UserError) as error:
        combine(parts, [survey_part(part, config, None) for part in parts]).refuse_too_many(
            config, "data_path"
        )
    assert row(mistake, refusal(error.value, place)) == ROWS[mistake.name], "run make docs"


def test_no_gpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(UserError) as error:
        resources.require_gpus(1)
    assert row(NAMED["no GPU"], refusal(error.value, place)) == ROWS["no GPU"], "run make docs"


def test_old_python(place: Path) -> None:
    assert row(NAMED["old Python"], made(NAMED["old Python"], place)) == ROWS["old Python"], "run make docs"


def test_every_mistake_is_told_with_a_remedy() -> None:
    """One line for each, but for Ctrl-C, which is none, and make's own line."""
    assert [name for name in ROWS if name in NAMED] == list(NAMED)
    for name in NAMED.keys() - {"Ctrl-C", "old Python"}:
        (line,) = re.findall(r"`+ ?error: [^|]+", ROWS[name])
        assert re.fullmatch(r"`+ ?error: \w+(=\S+)?: .+; .+", line), line
