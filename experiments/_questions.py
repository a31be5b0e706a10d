"""Evaluate the adapters of `003_many_questions` and write a table and a figure to `results/`.

    python -m experiments._questions runs/questions-HASH runs/data

Each method of asking is one `python -m workloads.evaluate answers` in its own process, for both languages.
Scores that exist are not measured again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments._command import run as run_command
from experiments._results import RESULTS, write_table
from parallelmind.config.yaml_file import load_yaml
from parallelmind.programs import module_name

# Passages and new tokens by language. SmolLM2's tokenizer needs many tokens for Chinese.
_LANGUAGES = {"en": (17, 16), "zh": (6, 24)}
_AT_ONCE = (2, 4, 8)
_COLOURS = {"one by one": "black", "batch": "#8d99ae", "columnar": "#f18f01", "isolated": "#2e86ab"}


def methods(visibility: str) -> dict[tuple[str, int], list[str]]:
    """Return settings of `evaluate answers` by (method, questions at once), for the adapter of a visibility.

    The padded batch does not depend on visibility, so it is measured for the columnar adapter only.
    """
    settings = {("one by one", 1): ["engine=one_by_one"]}
    settings |= {(visibility, count): [f"at_once={count}"] for count in _AT_ONCE}
    settings[f"{visibility}, 4 passages", 8] = ["at_once=8", "records_at_once=4"]
    if visibility == "columnar":
        settings |= {("batch", count): ["engine=batch", f"at_once={count}"] for count in _AT_ONCE}
    return settings


def measured(run: Path, data: Path) -> list[dict[str, Any]]:
    """Return a row for every language, adapter and method."""
    rows = []
    for language in _LANGUAGES:
        for trial in sorted((run / "trials").iterdir()):
            visibility = load_yaml(trial / "config.yaml")["visibility"]
            for (method, at_once), settings in methods(visibility).items():
                name = f"{method} {at_once}"
                scores = evaluate(run, data, language, trial / "adapter", name, settings)
                rows.append(
                    {
                        "language": language,
                        "adapter": visibility,
                        "way": method,
                        "questions at once": at_once,
                        **scores,
                    }
                )
    return rows


def evaluate(
    run: Path, data: Path, language: str, adapter: Path, name: str, settings: list[str]
) -> dict[str, Any]:
    """Return the scores of one method; run the evaluation unless its output file exists."""
    output = run / "answers" / f"{language} {adapter.parent.name} {name}.json"
    if not output.exists():
        output.parent.mkdir(exist_ok=True)
        passages, tokens = _LANGUAGES[language]
        fields = {
            "data_path": data / f"xquad.{language}.jsonl",
            "max_records": passages,
            "max_new_tokens": tokens,
            "show": 0,
            "lora_path": adapter,
            "output_path": output,
        }
        arguments = [*(f"{field}={value}" for field, value in fields.items()), *settings]
        command = ["-m", module_name("workloads.evaluate"), "answers", *arguments]
        print(*command, flush=True)
        subprocess.run([sys.executable, *command], check=True)
    scores: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    del scores["config"]
    return scores


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Draw F1 against questions/s: a line per method, its points are 2, 4 and 8 questions at once."""
    fig = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (language, title) in zip(
        fig.subplots(1, 2), {"en": "English", "zh": "Chinese"}.items(), strict=True
    ):
        _language(axes, [row for row in rows if row["language"] == language])
        axes.set_title(title)
    return fig


def _language(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for adapter, marker in {"columnar": "o", "isolated": "s"}.items():
        for method in dict.fromkeys(row["way"] for row in rows if row["adapter"] == adapter):
            own = [row for row in rows if (row["adapter"], row["way"]) == (adapter, method)]
            speeds, scores = [row["questions_per_second"] for row in own], [100 * row["f1"] for row in own]
            colour = _COLOURS[method.partition(",")[0]]
            axes.plot(
                speeds,
                scores,
                marker=marker,
                color=colour,
                label=f"{method} ({adapter} adapter)",
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
    """Evaluate everything; write results/003_many_questions.csv and .png."""
    rows = measured(Path(run), Path(data))
    write_table(RESULTS / "003_many_questions.csv", rows)
    figure(rows).savefig(RESULTS / "003_many_questions.png", dpi=110)


if __name__ == "__main__":
    run_command(main)
