"""The table of a sweep's trials as Parquet and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from parallelmind.storage import atomic_binary_file, atomic_file
from workloads.sweep.trial import Trial

CommandOf = Callable[[Trial], str]


def write_trial_files(
    folder: Path, trials: Sequence[Trial], metrics: Sequence[str], command_of: CommandOf
) -> None:
    """Write `trials.parquet` and `trials.csv`. A missing value is null in Parquet and empty in CSV."""
    table = _trial_table(trials, metrics, command_of)
    with atomic_binary_file(folder / "trials.parquet") as file:
        pq.write_table(table, file)
    with atomic_file(folder / "trials.csv") as text_file:
        writer = csv.writer(text_file, lineterminator="\n")
        writer.writerow(table.column_names)
        writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))


def setting_names(trials: Sequence[Trial]) -> list[str]:
    """The names of all settings, in the order of their first use."""
    return _distinct_keys(trial.settings for trial in trials)


def replace_surrogates(text: str) -> str:
    """The text without lone surrogates, which file names and errors may hold and UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def _trial_table(trials: Sequence[Trial], metrics: Sequence[str], command_of: CommandOf) -> pa.Table:
    """One row per trial. A metric with the name of a setting (`learning_rate`) is named `metrics/…`."""
    columns = {
        name: pa.array([getattr(trial, name) for trial in trials], pa.int64()) for name in ("number", "step")
    }
    columns["status"] = _text_column(trial.status for trial in trials)
    columns["seconds"] = pa.array([trial.seconds for trial in trials], pa.float64())
    for name in setting_names(trials):
        columns[name] = _setting_column([trial.settings.get(name) for trial in trials])
    for name in dict.fromkeys([*metrics, *sorted(_distinct_keys(trial.metrics for trial in trials))]):
        values = pa.array([trial.metrics.get(name) for trial in trials], pa.float64())
        columns[f"metrics/{name}" if name in columns else name] = values
    for name in ("folder", "run_id", "error"):
        columns[name] = _text_column(getattr(trial, name) for trial in trials)
    return pa.table({**columns, "command": _text_column(command_of(trial) for trial in trials)})


def _distinct_keys(mappings: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _setting_column(values: list[Any]) -> pa.Array:
    """Numbers and booleans keep their type; everything else becomes text, as JSON unless it is text."""
    types = {type(value) for value in values if value is not None}
    if types and (types <= {int, float} or types == {bool}):
        with suppress(pa.ArrowInvalid, OverflowError):  # an integer beyond 64 bits becomes text
            return pa.array(values)
    return _text_column(
        value if value is None or isinstance(value, str) else json.dumps(value, default=str)
        for value in values
    )


def _text_column(values: Iterable[str | None]) -> pa.Array:
    return pa.array([value if value is None else replace_surrogates(value) for value in values], pa.string())
