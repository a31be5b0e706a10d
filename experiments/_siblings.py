"""Train and measure experiments on tasks whose branches need each other.

    python -m experiments._siblings [006_siblings|009_sibling_penalty] [SETTING=VALUE …]

One command makes the data, trains an adapter per task, form and seed, and lets each answer held-out samples.
It writes a table and a figure to results/. What is finished is not repeated. SETTING=VALUE overrides the
sweep; rows of adapters that are not in it stay in the table.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

import parallelmind as pm
from experiments._command import run as run_command
from experiments._results import RESULTS, Row, trained, updated
from experiments._sibling_tasks import FORMS, TASKS, Form, data_path, records
from parallelmind.config.yaml_file import load_yaml
from parallelmind.engine.scheduler import EngineConfig
from workloads.common.read_config import read_config
from workloads.sweep.command import run_sweep
from workloads.sweep.config import SweepConfig

_SAMPLES, _HELD_OUT, _HELD_OUT_SEED = 4000, 64, 1
_MAX_NEW_TOKENS = 160
_LINE = re.compile(r"^\d+\.", re.MULTILINE)
_COLOURS = ("#2d7d46", "#7fb069", "#c5d86d", "#2e86ab", "#8d99ae", "#f18f01", "#a23b72")


def write_data() -> None:
    """Write the training data of every task and form, unless it exists."""
    for task in TASKS:
        for form in FORMS:
            path = Path(data_path(task, form))
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                lines = (json.dumps(record) + "\n" for record in records(task, form, _SAMPLES, seed=0))
                path.write_text("".join(lines), encoding="utf-8")


def answers(engine: pm.Engine, samples: Iterable[pm.Sample]) -> list[list[tuple[str, int]]]:
    """The text and the number of tokens of every branch of every sample."""
    given = {
        engine.submit(sample, max_new_tokens=_MAX_NEW_TOKENS): [("", 0)] * len(sample.branches)
        for sample in samples
    }
    while engine.busy:
        for event in engine.step():
            text, tokens = given[event.sample][event.branch]
            given[event.sample][event.branch] = text + event.text, tokens + (event.token is not None)
    return list(given.values())


def scores(task: str, form: Form, engine: pm.Engine) -> dict[str, float]:
    """Means over held-out samples.

    right: share of the answers that are right. conflicts: share of the answers that another branch gave, too.
    tokens: of all branches. steps: tokens of the longest one, which is the time until all have ended.
    """
    right, conflicts, tokens, steps = list[bool](), list[bool](), list[int](), list[int]()
    held_out = [record["branches"] for record in records(task, form, _HELD_OUT, _HELD_OUT_SEED)]
    samples = [pm.Sample(branches=[branch["prompt"] for branch in branches]) for branches in held_out]
    for branches, answered in zip(held_out, answers(engine, samples), strict=True):
        given, wanted = [text for text, _ in answered], [branch["completion"] for branch in branches]
        if form == "text":
            given, wanted = _LINE.split(given[0])[1:], _LINE.split(wanted[0])[1:]
            given = [*given, *[""] * len(wanted)][: len(wanted)]
        pairs = zip(map(str.split, given), map(str.split, wanted), strict=True)
        right += [_is_right(task, *pair) for pair in pairs]
        chosen = Counter(text.split()[-1] for text in given if text.strip())
        conflicts += [bool(text.strip()) and chosen[text.split()[-1]] > 1 for text in given]
        counts = [count for _, count in answered]
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


def measure(trial: Path) -> Row:
    """The row of an adapter; measured unless its file exists."""
    output = trial / "siblings.json"
    if not output.exists():
        config = load_yaml(trial / "config.yaml")
        _, task, name, _ = Path(config["data_path"]).name.split(".")
        form = next(form for form in FORMS if form == name)
        model, tokenizer = pm.load_model_with_lora(lora_path=trial / "adapter", dtype=config["dtype"])
        engine = pm.Engine(model, tokenizer, EngineConfig(cache_tokens=1 << 15))
        row = {"task": task, "form": _label(form, config), "seed": config["seed"]}
        row |= scores(task, form, engine)
        print(json.dumps(row), flush=True)
        output.write_text(json.dumps(row), encoding="utf-8")
    return dict(json.loads(output.read_text(encoding="utf-8")))


def _label(form: Form, config: dict[str, Any]) -> str:
    """The form, and what differs from branches that see each other without a penalty."""
    if form != "columnar":
        return form
    parts = [f"penalty {config['sibling_penalty']}"] if config["sibling_penalty"] else []
    parts += ["one clock"] if config["rope_2d_ratio"] == 0 else []
    parts += ["branch embeddings"] if config.get("branch_embeddings") else []  # not in older runs
    parts += [f"branch angle {config['branch_angle']}"] if config["branch_angle"] != "added" else []
    return ", ".join([form, *parts])


def key_of(row: Row) -> tuple[int, str, int]:
    """What tells an adapter from the others, in the order of the table."""
    return list(TASKS).index(row["task"]), row["form"], row["seed"]


def figure(rows: Sequence[Row]) -> Figure:
    """Draw right answers, conflicts and steps of every task and form; a dot for each seed."""
    fig = Figure(figsize=(11, 8), layout="constrained")
    forms, tasks = (list(dict.fromkeys(row[field] for row in rows)) for field in ("form", "task"))
    labels = {
        "right": "right answers",
        "conflicts": "same answer as another branch",
        "steps": "steps until all have ended",
    }
    width = 0.8 / len(forms)
    for axes, (field, label) in zip(fig.subplots(3, 1), labels.items(), strict=True):
        for place, form in enumerate(forms):
            for number, task in enumerate(tasks):
                values = [row[field] for row in rows if (row["task"], row["form"]) == (task, form)]
                if values:
                    at = number + (place - (len(forms) - 1) / 2) * width
                    axes.bar(at, fmean(values), 0.94 * width, color=_COLOURS[place])
                    axes.scatter([at] * len(values), values, color="black", s=8, zorder=3)
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=form) for form, colour in zip(forms, _COLOURS, strict=False)]
    fig.legend(handles=handles, frameon=False, loc="outside right upper")
    return fig


def main(*arguments: str) -> None:
    """Make, train, measure; write the table and the figure of the experiment to results/."""
    named = [argument for argument in arguments if "=" not in argument] or ["006_siblings"]
    write_data()
    config = read_config(SweepConfig, [*named, *(argument for argument in arguments if "=" in argument)])
    table = (RESULTS / named[0]).with_suffix(".csv")
    measured = [measure(trial) for trial in trained(Path(run_sweep(config).location))]
    rows = updated(table, measured, key_of)
    figure(rows).savefig(table.with_suffix(".png"), dpi=110)
    print(f"{table}: {len(rows)} adapters")


if __name__ == "__main__":
    run_command(main)
