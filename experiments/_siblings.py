"""Train and measure `006_siblings`: branches that see each other, isolated ones, and one text.

    python -m experiments._siblings

One command makes the data, trains an adapter per task, form and seed, and lets each answer held-out samples.
It writes a table and a figure to results/. What is finished is not repeated. SETTING=VALUE overrides the
sweep.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

import parallelmind as pm
from experiments._results import RESULTS, write_table
from experiments._sibling_tasks import TASKS, Form, records
from parallelmind.config.yaml_file import load_yaml
from workloads.common.read_config import read_config
from workloads.sweep.command import run_sweep
from workloads.sweep.config import SweepConfig

TABLE = RESULTS / "006_siblings.csv"
FORMS: tuple[Form, ...] = ("columnar", "isolated", "text")
_DATA = Path("runs/data")
_SAMPLES, _HELD_OUT, _HELD_OUT_SEED = 4000, 64, 1
_MAX_NEW_TOKENS = 160
_LINE = re.compile(r"^\d+\.", re.MULTILINE)
_COLOURS = {
    "columnar, penalty 0": "#2d7d46",
    "columnar, penalty 1": "#7fb069",
    "columnar, penalty 3": "#c5d86d",
    "isolated": "#2e86ab",
    "text": "#8d99ae",
}


def write_data() -> None:
    """Write the training data of every task and form, unless it exists."""
    _DATA.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        for form in FORMS:
            path = _DATA / f"siblings.{task}.{form}.jsonl"
            if not path.exists():
                lines = (json.dumps(record) + "\n" for record in records(task, form, _SAMPLES, seed=0))
                path.write_text("".join(lines), encoding="utf-8")


def answers(engine: pm.Engine, sample: pm.Sample) -> tuple[list[str], list[int]]:
    """The texts and the numbers of tokens of all branches."""
    texts, tokens = [""] * len(sample.branches), [0] * len(sample.branches)
    engine.submit(sample, max_new_tokens=_MAX_NEW_TOKENS)
    while engine.busy:
        for event in engine.step():
            texts[event.branch] += event.text
            tokens[event.branch] += event.token is not None
    return texts, tokens


def scores(task: str, form: Form, engine: pm.Engine) -> dict[str, float]:
    """Means over held-out samples.

    right: share of the answers that are right. conflicts: share of the answers that another branch gave, too.
    tokens: of all branches. steps: tokens of the longest one, which is the time until all have ended.
    """
    right, conflicts, tokens, steps = list[bool](), list[bool](), list[int](), list[int]()
    for record in records(task, form, _HELD_OUT, _HELD_OUT_SEED):
        branches = record["branches"]
        given, counts = answers(engine, pm.Sample(branches=[branch["prompt"] for branch in branches]))
        wanted = [branch["completion"] for branch in branches]
        if form == "text":
            given, wanted = _LINE.split(given[0])[1:], _LINE.split(wanted[0])[1:]
            given = [*given, *[""] * len(wanted)][: len(wanted)]
        pairs = zip(map(str.split, given), map(str.split, wanted), strict=True)
        right += [_is_right(task, *pair) for pair in pairs]
        chosen = Counter(text.split()[-1] for text in given if text.strip())
        conflicts += [bool(text.strip()) and chosen[text.split()[-1]] > 1 for text in given]
        tokens.append(sum(counts))
        steps.append(max(counts))
    return {
        "right": fmean(right),
        "conflicts": fmean(conflicts),
        "tokens": fmean(tokens),
        "steps": fmean(steps),
    }


def _is_right(task: str, given: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the last word of an answer is right; of what was read aloud, every word up to it."""
    if task == "find" and wanted[-1] != "found":
        return given[-1:] != ["found"]
    return list(given) == list(wanted) if task == "find" else given[-1:] == wanted[-1:]


def measure(trial: Path) -> dict[str, Any]:
    """The row of an adapter; measured unless its file exists."""
    output = trial / "siblings.json"
    if not output.exists():
        config = load_yaml(trial / "config.yaml")
        _, task, name, _ = Path(config["data_path"]).name.split(".")
        form = next(form for form in FORMS if form == name)
        model, tokenizer = pm.load_model_with_lora(lora_path=trial / "adapter", dtype=config["dtype"])
        penalty = f", penalty {config['sibling_penalty']:g}" if form == "columnar" else ""
        row = {"task": task, "form": form + penalty, "seed": config["seed"]}
        row |= scores(task, form, pm.Engine(model, tokenizer))
        print(json.dumps(row), flush=True)
        output.write_text(json.dumps(row), encoding="utf-8")
    return dict(json.loads(output.read_text(encoding="utf-8")))


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw right answers, and tokens until all have ended, of every task and form; a dot for each seed."""
    fig = Figure(figsize=(11, 6), layout="constrained")
    for axes, (field, label) in zip(
        fig.subplots(2, 1),
        {"right": "right answers", "steps": "steps until all have ended"}.items(),
        strict=True,
    ):
        for place, (form, colour) in enumerate(_COLOURS.items()):
            for number, task in enumerate(TASKS):
                values = [float(row[field]) for row in rows if (row["task"], row["form"]) == (task, form)]
                if values:
                    at = number + (place - 2) * 0.16
                    axes.bar(at, fmean(values), 0.15, color=colour, label=form if number == 0 else None)
                    axes.scatter([at] * len(values), values, color="black", s=8, zorder=3)
        axes.set_xticks(range(len(TASKS)), list(TASKS))
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    fig.axes[0].legend(frameon=False, ncols=len(_COLOURS), loc="upper center", bbox_to_anchor=(0.5, 1.15))
    return fig


def main(*overrides: str) -> None:
    """Make, train, measure; write results/006_siblings.csv and .png."""
    write_data()
    config = read_config(SweepConfig, ["006_siblings", *overrides])
    sweep_dir = Path(run_sweep(config).location)
    rows = [measure(trial) for trial in sorted((sweep_dir / "trials").iterdir())]
    write_table(TABLE, rows)
    figure(rows).savefig(RESULTS / "006_siblings.png", dpi=110)
    print(f"{TABLE}: {len(rows)} adapters")


if __name__ == "__main__":
    main(*sys.argv[1:])
