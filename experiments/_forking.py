"""Train and measure `008_forking`: answers as one text against answers that fork by themselves.

    python -m experiments._forking PATH/xquad.en.json

One command makes the data, trains an adapter per form and seed, answers the held-out requests with each, one
request at a time, and lets the forking one generate 1,000 answers at temperature 1. It writes a table and a
figure to results/. What is finished is not repeated. SETTING=VALUE after the path overrides the sweep; the
table keeps the rows of adapters that are not in it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter

from matplotlib.figure import Figure

import parallelmind as pm
from experiments._command import run as run_command
from experiments._forking_data import QUESTIONS, Request, answers_in, prompt_of, write
from experiments._results import RESULTS, Row, trained, updated
from parallelmind.config.yaml_file import load_yaml
from parallelmind.engine.linear import linearized
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.evaluation.qa_metrics import f1
from workloads.common.read_config import read_config
from workloads.sweep.command import run_sweep
from workloads.sweep.config import SweepConfig

TABLE = RESULTS / "008_forking.csv"
_DATA = Path("runs/data")
_MAX_NEW_TOKENS = 2048
_HANG_ANSWERS, _HANG_TOKENS, _HANG_AT_ONCE = 1000, 256, 20
_COLOURS = {"sequential": "#8d99ae", "forking": "#2e86ab"}


def answer_all(engine: pm.Engine, requests: Sequence[Request]) -> dict[str, float]:
    """F1 of the answers, and steps and seconds of a request, decoded one at a time."""
    scores, steps, seconds, forks = list[float](), list[int](), list[float](), 0
    for request in requests:
        start, num_steps, events = perf_counter(), 0, list[pm.Event]()
        engine.submit(pm.Sample(branches=[prompt_of(request)]), max_new_tokens=_MAX_NEW_TOKENS)
        while engine.busy:
            events += engine.step()
            num_steps += 1
        seconds.append(perf_counter() - start)
        steps.append(num_steps)
        forks += any(event.fork is not None for event in events)
        given = answers_in("".join(event.text for event in linearized(events)))
        scores += [
            f1(given.get(number, ""), question.answers)
            for number, question in enumerate(request.questions, 1)
        ]
    return {
        "f1": fmean(scores),
        "steps": fmean(steps),
        "seconds": fmean(seconds),
        "forked": forks / len(requests),
    }


def count_hangs(engine: pm.Engine, requests: Sequence[Request]) -> dict[str, float]:
    """Answers at temperature 1 that do not end within their limits of tokens, branches and depth."""
    hangs, forked = 0, 0
    for first in range(0, _HANG_ANSWERS, _HANG_AT_ONCE):
        groups = dict[int, dict[int, int]]()
        for seed in range(first, first + _HANG_AT_ONCE):
            sample = pm.Sample(branches=[prompt_of(requests[seed % len(requests)])])
            number = engine.submit(sample, max_new_tokens=_HANG_TOKENS, temperature=1.0, seed=seed)
            groups[number] = defaultdict[int, int](int)
        most_steps = engine.scheduler.num_steps + _HANG_AT_ONCE * (_HANG_TOKENS + 64)  # one after another
        while engine.busy and engine.scheduler.num_steps < most_steps:
            for event in engine.step():
                groups[event.sample][event.branch] += event.token is not None
                forked += event.fork is not None
        hangs += sum(
            engine.has_sample(number) or sum(tokens.values()) > _HANG_TOKENS
            for number, tokens in groups.items()
        )
    return {"hangs": hangs, "forks_at_temperature_1": forked}


def measure(trial: Path, requests: Sequence[Request]) -> Row:
    """The row of an adapter; measured unless its file exists."""
    output = trial / "forking.json"
    if not output.exists():
        config = load_yaml(trial / "config.yaml")
        form = str(config["data_path"]).rsplit(".", 2)[-2]
        model, tokenizer = pm.load_model_with_lora(lora_path=trial / "adapter", dtype=config["dtype"])
        engine = pm.Engine(model, tokenizer, EngineConfig(cache_tokens=1 << 15))
        answer_all(engine, requests[:1])  # what is done once
        row = {"form": form, "seed": config["seed"], **answer_all(engine, requests)}
        if form == "forking" and config["seed"] == 0:
            row |= count_hangs(engine, requests)
        print(json.dumps(row), flush=True)
        output.write_text(json.dumps(row), encoding="utf-8")
    row = json.loads(output.read_text(encoding="utf-8"))
    return dict(row)


def figure(rows: Sequence[Row]) -> Figure:
    """Draw F1 and steps of every adapter."""
    fig = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (field, label) in zip(
        fig.subplots(1, 3),
        {"f1": "F1", "steps": "steps of a request", "seconds": "seconds of a request"}.items(),
        strict=True,
    ):
        for place, (form, colour) in enumerate(_COLOURS.items()):
            values = [float(row[field]) for row in rows if row["form"] == form]
            axes.bar(place, fmean(values), color=colour)
            axes.scatter([place] * len(values), values, color="black", s=12)
        axes.set_xticks(range(len(_COLOURS)), list(_COLOURS))
        axes.set_title(label)
    return fig


def main(source: str, *overrides: str) -> None:
    """Make, train, measure; write results/008_forking.csv and .png."""
    requests = write(Path(source), _DATA)
    config = read_config(SweepConfig, ["008_forking", *overrides])
    measured = [measure(trial, requests) for trial in trained(Path(run_sweep(config).location))]
    rows = updated(TABLE, measured, lambda row: (list(_COLOURS).index(row["form"]), row["seed"]))
    figure(rows).savefig(RESULTS / "008_forking.png", dpi=110)
    print(f"{TABLE}: {len(rows)} adapters, {QUESTIONS} questions a request")


if __name__ == "__main__":
    run_command(main)
