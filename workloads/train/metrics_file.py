"""The metrics of a run as a file in its folder: one JSON line per logged step, whatever MLflow does."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from parallelmind.errors import UserError, first_line
from parallelmind.remote import RemotePath
from parallelmind.storage import atomic_file


class MetricPoint(NamedTuple):
    """Finite metrics of one step. time_ms: when they were logged, since 1970."""

    step: int
    time_ms: int
    metrics: dict[str, float]


class MetricsFile:
    """The file of one run, which one process appends to. Each metric has at most one value per step.

    Steps that a resumed run repeats are not appended again. points: the content of the file.
    """

    def __init__(self, file: RemotePath) -> None:
        self._file = file
        self._last_steps: dict[str, int] = {}
        self.points: list[MetricPoint] = []
        points = read_points(file)
        write_points(file, points)  # without a line that a kill cut off
        for point in points:
            self._remember(point)

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        new = {
            name: float(value)
            for name, value in metrics.items()
            if math.isfinite(value) and step > self._last_steps.get(name, -1)
        }
        if new:
            point = MetricPoint(step, time.time_ns() // 1_000_000, new)
            with open(self._file.local, "a", encoding="utf-8") as stream:
                stream.write(_line(point))
            self._remember(point)

    def _remember(self, point: MetricPoint) -> None:
        self.points.append(point)
        self._last_steps.update(dict.fromkeys(point.metrics, point.step))


def read_points(file: RemotePath) -> list[MetricPoint]:
    """The points of the file on this machine, else of that at the URI; without a line that is cut off.

    Raises UserError for a whole line that is not a point.
    """
    content = file.local.read_bytes() if file.local.is_file() else file.read_bytes() or b""
    lines = content.split(b"\n")[:-1]
    return [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, where: str) -> MetricPoint:
    try:
        return MetricPoint(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: is no line of metrics ({first_line(error)}); remove the line and run the same command"
        ) from error


def write_points(file: RemotePath, points: Iterable[MetricPoint]) -> None:
    """Replace the file on this machine."""
    with atomic_file(file.local) as stream:
        stream.writelines(map(_line, points))


def histories(points: Iterable[MetricPoint]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point of each metric, in order."""
    values = defaultdict[str, list[tuple[int, float]]](list)
    for point in points:
        for name, value in point.metrics.items():
            values[name].append((point.step, value))
    return dict(values)


def _line(point: MetricPoint) -> str:
    return json.dumps(point._asdict()) + "\n"
