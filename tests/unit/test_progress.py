"""Progress of long work on stderr: nothing at first, then bars or lines."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from tiny import save_tiny
from transformers.utils import logging as transformers_logging

from parallelmind import progress
from parallelmind.config import ModelConfig
from parallelmind.model.base_model import load_base
from parallelmind.progress import DelayedBar, waiting


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.01)


def work(seconds: float) -> None:
    for _ in DelayedBar(range(10), desc="Loading weights", name="hub"):
        time.sleep(seconds / 10)


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    work(0.05)
    with waiting("compiling"):
        time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_long_work_shows_lines_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.1)
    work(0.4)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert all(line.startswith("Loading weights: ") and line.endswith(" left") for line in err.splitlines())
    assert err.count("%") == len(err.splitlines()) > 1


def test_long_work_without_a_known_end_shows_the_time_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.05)
    with waiting("compiling the forward pass"):
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == ""
    assert set(err.splitlines()) == {"compiling the forward pass: 0 s so far"}


def test_a_terminal_shows_the_bar_in_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    work(0.8)
    err = capsys.readouterr().err
    assert "\rLoading weights:" in err
    assert "\n" not in err


def test_one_of_several_workers_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    monkeypatch.setenv("RANK", "1")
    work(0.1)
    assert capsys.readouterr().err == ""


def test_loading_and_saving_show_it_and_leave_no_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path)
    capsys.readouterr()
    load_base(ModelConfig(base_model=folder))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    load_base(ModelConfig(base_model=folder))
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^Loading weights: \d+%, .* left$", err, re.MULTILINE)
    assert transformers_logging.set_tqdm_hook(None) is None
