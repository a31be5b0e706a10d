"""Behaviour that all command lines share: notices, progress lines and exit codes."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from subprocess import PIPE

import pytest
from permissions import obeying_permissions

from parallelmind import cli
from parallelmind.errors import UserError, UserNotice


def test_notice_is_one_line_without_a_source_location():
    assert cli._one_line(UserNotice("mind this"), UserNotice, "file.py", 3) == "note: mind this\n"
    assert "file.py:3" in cli._one_line(UserWarning("theirs"), UserWarning, "file.py", 3, line="code")


def test_progress_without_a_terminal_reports_the_remaining_time(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_SECONDS_BETWEEN_LINES", -1)
    with cli.progress("working", 4) as report_progress:
        for done in range(3):
            report_progress(done, partial("{} done".format, done))
    assert capsys.readouterr().err == "0 done\n1 done, 0:00:00 left\n2 done, 0:00:00 left\n"


def test_a_terminal_shows_a_bar_for_long_work_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for delay in (60.0, 0.0):
        monkeypatch.setattr(cli, "DELAY_S", delay)
        with cli.progress("working", 4) as report_progress:
            report_progress(2, lambda: "2 done")
        out, err = capsys.readouterr()
        assert out == ""
        assert ("working" in err and "50%" in err and "2 done" in err) == (delay == 0)
        assert delay == 0 or err == ""


def test_a_file_that_may_not_be_opened_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "secret").touch(mode=0)
    monkeypatch.setattr(sys, "argv", ["command"])
    with obeying_permissions(), pytest.raises(SystemExit) as stop:
        cli.run(lambda argv: print((tmp_path / "secret").read_text()))
    assert stop.value.code == 2
    line = f"error: {tmp_path}/secret: Permission denied; give yourself access to it\n"
    assert capsys.readouterr().err == line


def test_user_error_exits_with_code_2(monkeypatch, capsys):
    def fail(argv):
        raise UserError("field=1: too low; give 2")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as stop:
        cli.run(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: field=1: too low; give 2\n"


def test_a_command_ends_quietly_when_nothing_reads_its_output():
    """As `parallelmind … | head -1`. Before, it ended with a traceback."""
    code = "from parallelmind import cli; cli.run(lambda argv: [print('x' * 9999) for _ in range(99)])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout.readline() == b"x" * 9999 + b"\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
