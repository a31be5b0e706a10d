"""A sweep's report: one HTML page that needs nothing beside it, its pictures, and its table for other
programs.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from parallelmind.storage import atomic_binary_file, atomic_file
from workloads.sweep import plots as sweep_plots
from workloads.sweep.trial_table import Status, Trial
from workloads.sweep.values import measured

Command = Callable[[Trial], str]

_DPI = 144
_TITLES = {
    "loss_vs_branches": "Loss against number of branches: means of n finished trials, shaded from lowest to highest. "
    "A flat line pays no branch tax.",
    "heat_map": "Mean of the finished trials, over seeds and whatever else was swept. Hatched: nothing finished there.",
    "parallel_coordinates": "Every trial through its settings to its objective; dark is low, and low is good. "
    "Dashed grey: stopped early or failed.",
    "cost_vs_quality": "What training time bought; numbers are those of the trials. "
    "No finished trial is both cheaper and better than one on the front.",
}
_BRANCH_TAX = (
    "Branch tax is the price of reading or writing several branches at once: the loss at N branches minus the loss at 1 branch, "
    "same model, same text. At zero, a text is predicted as well beside its siblings as alone. Lower is better."
)
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a second lock beside the escaping
_STYLE = """
:root { color-scheme: light dark; }
:root { --page: #fff; --text: #1b1d21; --line: #d4d7dc; --soft: #f4f5f7; --win: #dff3e4; --bad: #a4262c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #17191c; --text: #e6e7e9; --line: #3c4048; --soft: #23262b; --win: #1d3b29; --bad: #ff9a9a; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--text); }
a { color: inherit; }
.table { overflow: auto; max-height: 36rem; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; min-width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--page); }
td:nth-child(2), th:nth-child(2) { text-align: left; }
tr.winner { background: var(--win); font-weight: 600; } tr:last-child td { border-bottom: 0; } .failed { color: var(--bad); }
figure { margin: 1.5rem 0; } figcaption { font-size: .875rem; }
img { display: block; max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
pre { margin: .2rem 0 1rem; padding: .6rem; background: var(--soft); border-radius: 6px; white-space: pre-wrap; }
pre code { user-select: all; }
"""


def write_report(
    folder: Path,
    title: str,
    trials: Sequence[Trial],
    metrics: Sequence[str],
    winner: int | None,
    command: Command,
) -> Path:
    """Fill `folder` with the page, the pictures and the table, each whole or not at all; returns the page's
    path.

    metrics: the objectives, lower is better; the pictures show the first. winner: a trial's number. command:
    trains a trial again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_table(folder, trials, metrics, command)
    pictures = _write_pictures(folder, trials, metrics[0])
    page = "\n".join(_page(title, trials, metrics, winner, command, pictures))
    with atomic_file(folder / "report.html") as file:
        file.write(_utf8(page))
    return folder / "report.html"


def _utf8(text: str) -> str:
    """Without the lone surrogates that file names and errors may bring along: they cannot be written."""
    return text.encode(errors="replace").decode()


def _write_pictures(folder: Path, trials: Sequence[Trial], objective: str) -> dict[str, bytes]:
    """The PNGs by name. One that an earlier report drew and this one has no ground for is removed."""
    figures: dict[str, Figure | None] = {
        "loss_vs_branches": sweep_plots.loss_vs_branches(trials),
        "heat_map": sweep_plots.heat_map(trials, objective),
        "parallel_coordinates": sweep_plots.parallel_coordinates(trials, objective),
        "cost_vs_quality": sweep_plots.cost_vs_quality(trials, objective),
    }
    pictures = {}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=_DPI)
        pictures[name] = drawn.getvalue()
        with atomic_binary_file(path) as file:
            file.write(pictures[name])
    return pictures


def _write_table(folder: Path, trials: Sequence[Trial], metrics: Sequence[str], command: Command) -> None:
    """`trials.parquet` and `trials.csv`: what is missing is null there and empty here."""
    table = _table(trials, metrics, command)
    with atomic_binary_file(folder / "trials.parquet") as packed:
        pq.write_table(table, packed)
    with atomic_file(folder / "trials.csv") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(table.column_names)
        rows.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _table(trials: Sequence[Trial], metrics: Sequence[str], command: Command) -> pa.Table:
    """A row per trial. A metric of the same name as a setting (`learning_rate`) is called `metrics/…`."""
    columns = {
        name: pa.array([getattr(trial, name) for trial in trials], pa.int64()) for name in ("number", "step")
    }
    columns["status"] = _texts(trial.status for trial in trials)
    columns["seconds"] = pa.array([trial.seconds for trial in trials], pa.float64())
    columns |= {
        name: _column([trial.settings.get(name) for trial in trials])
        for name in _names(t.settings for t in trials)
    }
    for name in dict.fromkeys([*metrics, *sorted(_names(trial.metrics for trial in trials))]):
        values = pa.array([trial.metrics.get(name) for trial in trials], pa.float64())
        columns[f"metrics/{name}" if name in columns else name] = values
    columns |= {
        name: _texts(getattr(trial, name) for trial in trials) for name in ("folder", "run_id", "error")
    }
    return pa.table({**columns, "command": _texts(command(trial) for trial in trials)})


def _names(mappings: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _column(values: list[Any]) -> pa.Array:
    """Numbers or switches as they are; anything else as text, JSON where it is not text already."""
    kinds = {type(value) for value in values if value is not None}
    if kinds and (kinds <= {int, float} or kinds == {bool}):
        with suppress(pa.ArrowInvalid, OverflowError):  # an integer that no column has room for is text
            return pa.array(values)
    return _texts(
        value if value is None or isinstance(value, str) else json.dumps(value, default=str)
        for value in values
    )


def _texts(values: Iterable[str | None]) -> pa.Array:
    return pa.array([value if value is None else _utf8(value) for value in values], pa.string())


def _page(
    title: str,
    trials: Sequence[Trial],
    metrics: Sequence[str],
    winner: int | None,
    command: Command,
    pictures: dict[str, bytes],
) -> list[str]:
    best = next((trial for trial in trials if trial.number == winner), None)
    failed = [trial for trial in trials if trial.status == "failed"]
    return [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
        f"<p>{_counts(trials)}</p>",
        *(_winner(best, metrics, command) if best else ["<p>There is no winner.</p>"]),
        f"<p>{_BRANCH_TAX}</p>\n<h2>Trials</h2>",
        *_rows(trials, metrics, winner),
        '<p>All metrics: <a href="trials.csv">trials.csv</a>, <a href="trials.parquet">trials.parquet</a>.</p>',
        *(line for name, drawn in pictures.items() for line in _picture(name, drawn)),
        *(["<h2>Failed trials</h2>"] if failed else []),
        *(
            f"<p>{_told(trial)}</p>\n<pre>{escape(trial.error or 'no error was kept')}</pre>"
            for trial in failed
        ),
        "<h2>Commands</h2>\n<p>Each trains one trial again; a click selects it whole.</p>",
        *(f"<p>{_told(trial)}</p>\n{_code(command(trial))}" for trial in trials),
        "</body>\n</html>\n",
    ]


def _counts(trials: Sequence[Trial]) -> str:
    """How many there are of each status; those that a sweep ends with are told even where there are none."""
    counts = Counter(trial.status for trial in trials)
    told = ("finished", "stopped", "failed", *(status for status in get_args(Status)[:2] if counts[status]))
    early = {"stopped": "stopped early"}
    every = ", ".join(f"{counts[status]} {early.get(status, status)}" for status in told)
    return f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}: {every}."


def _winner(trial: Trial, metrics: Sequence[str], command: Command) -> list[str]:
    reached = ", ".join(f"{escape(metric)} {_shown(_number(trial, metric))}" for metric in metrics)
    return [f"<p><strong>Winner: {_told(trial)}</strong> — {reached}</p>", _code(command(trial))]


def _told(trial: Trial) -> str:
    return escape(f"trial {trial.number}: {trial.told()}")


def _code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def _picture(name: str, drawn: bytes) -> list[str]:
    title = escape(_TITLES[name])
    return [
        f'<figure>\n<img alt="{name.replace("_", " ")}" src="data:image/png;base64,{base64.b64encode(drawn).decode()}">',
        f"<figcaption>{title}</figcaption>\n</figure>",
    ]


def _rows(trials: Sequence[Trial], metrics: Sequence[str], winner: int | None) -> list[str]:
    """The table, in a box that scrolls by itself: those with the lowest first objective first, those without
    it last.
    """
    settings = _names(trial.settings for trial in trials)
    heads = ["trial", "status", *settings, *metrics, "step", "seconds"]
    lines = ['<div class="table" role="region" aria-label="trials" tabindex="0">\n<table>\n<thead>\n<tr>']
    lines += [*(f'<th scope="col">{escape(head)}</th>' for head in heads), "</tr>\n</thead>\n<tbody>"]
    for trial in sorted(trials, key=lambda trial: _rank(trial, metrics[0])):
        values = [
            *(trial.settings.get(name) for name in settings),
            *(_number(trial, name) for name in metrics),
        ]
        status, look = (
            (f"{trial.status} ★", "winner") if trial.number == winner else (trial.status, trial.status)
        )
        cells = [str(trial.number), status, *map(_shown, values), str(trial.step), f"{trial.seconds:,.0f}"]
        lines.append(f'<tr class="{look}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return [*lines, "</tbody>\n</table>\n</div>"]


def _rank(trial: Trial, objective: str) -> tuple[bool, float, int]:
    score = measured(trial, objective) if trial.status == "finished" else None
    return (score is None, score or 0.0, trial.number)


def _number(trial: Trial, metric: str) -> str | None:
    """As many digits as tell trials apart, zeros too, so that a column of them lines up."""
    return None if (value := trial.metrics.get(metric)) is None else f"{value:#.5g}"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return escape(f"{value:.5g}" if isinstance(value, float) else str(value))
