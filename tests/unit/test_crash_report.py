"""The report of an exception shows the last frames of the process that raised it, once."""

from __future__ import annotations

import pickle
import sys

import pytest
import ray.exceptions
import ray.train

from parallelmind import cli
from parallelmind.crash_report import crash_line, crash_report, keep_traceback, root_cause

TASK_REPORT = '  File "/x/server.py", line 7, in next_batch\n    read()\nKeyError: 1'


class UnpicklableError(Exception):
    def __init__(self, text: str, *, response: object) -> None:
        super().__init__(text)


def fail(error: Exception, depth: int = 4) -> None:
    if depth:
        again(error, depth)
    raise error


def again(error: Exception, depth: int) -> None:
    fail(error, depth - 1)


def sent(error: Exception) -> Exception:
    """The exception as it arrives in another process."""
    try:
        with keep_traceback():
            fail(error)
    except Exception as raised:
        copy: Exception = pickle.loads(pickle.dumps(raised))
    return copy


def task_error(cause: Exception) -> Exception:
    """The error of a Ray task as it arrives in the driver, through a worker."""
    text = f"ray::BatchServer.next_batch()\n{TASK_REPORT}\n"
    error: Exception = ray.exceptions.RayTaskError("next_batch", text, cause).as_instanceof_cause()
    try:
        with keep_traceback():
            raise error
    except Exception as raised:
        copy: Exception = ray.cloudpickle.loads(ray.cloudpickle.dumps(raised))
    return copy


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (
            sent(RuntimeError("CUDA error: an illegal access\nmore")),
            "RuntimeError: CUDA error: an illegal access\nmore",
        ),
        (sent(UnpicklableError("no answer", response=object())), "UnpicklableError: no answer"),
    ],
)
def test_a_worker_is_reported_with_its_own_last_frames(error: Exception, end: str) -> None:
    report = crash_report(ray.train.WorkerGroupError("workers failed", {1: error}))
    assert report.endswith(end)
    assert report.count('  File "') == 5
    assert report.count("test_crash_report.py") == 5


def test_a_ray_task_inside_a_worker_is_reported_with_the_frames_of_the_task() -> None:
    error = ray.train.WorkerGroupError("workers failed", {0: task_error(KeyError(1))})
    assert crash_report(error) == TASK_REPORT
    assert isinstance(root_cause(error), KeyError)
    assert crash_line(error) == 'KeyError: 1 (File "/x/server.py", line 7, in next_batch)'


def test_a_function_of_ray_data_is_reported_although_its_error_is_wrapped_on_the_worker() -> None:
    wrapped = "The above exception was the direct cause of the following exception:"
    text = (
        f"ray::Map()\n{TASK_REPORT}\n\n{wrapped}\n\nray::Map()\nray.exceptions.UserCodeException: UDF failed"
    )
    error = ray.exceptions.RayTaskError("map", text, ValueError("UDF failed")).as_instanceof_cause()
    assert crash_report(error) == TASK_REPORT


def test_a_long_message_is_cut() -> None:
    assert len(crash_report(sent(ValueError("line\n" * 500))).splitlines()) < 40


def test_a_crash_prints_its_last_frames_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(sys, "excepthook", lambda *_: pytest.fail("Ray's hook may block"))
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (last frames):\n")
    assert printed.endswith("RuntimeError: broken\n")
    assert printed.count("broken") == 2  # the line of code, and the message
