"""The answers of `003_many_questions`: every way of asking, in both languages, as a table and a picture in
`results/`.

    python -m experiments._questions runs/questions-HASH runs/data

Each way is one `python -m workloads.evaluate answers` in a process of its own. What has been measured is not
measured again.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parallelmind.config.yaml_file import load_yaml

_RESULTS = Path(__file__).parent / "results"
_ASKED = {
    "en": (17, 16),
    "zh": (6, 24),
}  # passages, new tokens: SmolLM2's tokenizer needs many for Chinese, and minutes
_TOGETHER = (2, 4, 8)
_COLOURS = {"one by one": "black", "batch": "#8d99ae", "columnar": "#f18f01", "isolated": "#2e86ab"}


def ways(visibility: str) -> dict[tuple[str, int], list[str]]:
    """Settings of `evaluate answers` by name and questions at once, for the adapter of this visibility.

    The batch is the same for both.
    """
    found = {("one by one", 1): ["engine=one_by_one"]}
    found |= {(visibility, count): [f"at_once={count}"] for count in _TOGETHER}
    found[f"{visibility}, 4 passages", 8] = ["at_once=8", "records_at_once=4"]
    if visibility == "columnar":
        found |= {("batch", count): ["engine=batch", f"at_once={count}"] for count in _TOGETHER}
    return found


def measured(run: Path, data: Path) -> list[dict[str, Any]]:
    """A row for every language, adapter and way."""
    rows = []
    for language in _ASKED:
        for trial in sorted((run / "trials").iterdir()):
            visibility = load_yaml(trial / "config.yaml")["visibility"]
            for (way, together), settings in ways(visibility).items():
                found = ask(run, data, language, trial / "adapter", f"{way} {together}", settings)
                rows.append(
                    {
                        "language": language,
                        "adapter": visibility,
                        "way": way,
                        "questions at once": together,
                        **found,
                    }
                )
    return rows


def ask(run: Path, data: Path, language: str, adapter: Path, way: str, settings: list[str]) -> dict[str, Any]:
    """The scores of one way, measured now or before."""
    scores = run / "answers" / f"{language} {adapter.parent.name} {way}.json"
    if not scores.exists():
        scores.parent.mkdir(exist_ok=True)
        passages, tokens = _ASKED[language]
        given = {
            "data_path": data / f"xquad.{language}.jsonl",
            "max_records": passages,
            "max_new_tokens": tokens,
            "show": 0,
            "lora_path": adapter,
            "output_path": scores,
        }
        line = [
            sys.executable,
            "-m",
            "workloads.evaluate",
            "answers",
            *(f"{name}={value}" for name, value in given.items()),
        ]
        print(*line[1:], *settings, flush=True)
        subprocess.run([*line, *settings], check=True)
    found: dict[str, Any] = json.loads(scores.read_text(encoding="utf-8"))
    del found["config"]
    return found


def figure(rows: list[dict[str, Any]]) -> Figure:
    """F1 against questions per second; a line for each way, its points 2, 4 and 8 questions at once."""
    drawn = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (language, title) in zip(
        drawn.subplots(1, 2), {"en": "English", "zh": "Chinese"}.items(), strict=True
    ):
        _language(axes, [row for row in rows if row["language"] == language])
        axes.set_title(title)
    return drawn


def _language(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for adapter, marker in {"columnar": "o", "isolated": "s"}.items():
        for way in dict.fromkeys(row["way"] for row in rows if row["adapter"] == adapter):
            own = [row for row in rows if (row["adapter"], row["way"]) == (adapter, way)]
            speeds, scores = [row["questions_per_second"] for row in own], [100 * row["f1"] for row in own]
            colour = _COLOURS[way.partition(",")[0]]
            axes.plot(
                speeds,
                scores,
                marker=marker,
                color=colour,
                label=f"{way} ({adapter} adapter)",
                markersize=7 - len(own),
            )
            for row, x, y in zip(own, speeds, scores, strict=True):
                axes.annotate(
                    str(row["questions at once"]), (x, y), (4, 4), textcoords="offset points", fontsize=8
                )
    axes.set(xlabel="questions/s", ylabel="F1, percent", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)


def main(run: str, data: str) -> None:
    rows = measured(Path(run), Path(data))
    with open(_RESULTS / "003_many_questions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure(rows).savefig(_RESULTS / "003_many_questions.png", dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
