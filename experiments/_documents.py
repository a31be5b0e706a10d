"""Train, evaluate and compare the adapters of `007_documents`: documents as branches, and as one text.

    python -m experiments._documents path/to/xquad.en.json

One command makes the data, runs the sweep, evaluates every adapter with 2, 4 and 8 documents, and writes
results/007_documents.csv and .png, and the row of the comparison to results/bench.json. What is finished is
not repeated. SETTING=VALUE after the path overrides the sweep; the table keeps the rows of adapters that are
not in it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from experiments._command import run as run_command
from experiments._results import RESULTS, Row, trained, updated
from parallelmind.config.yaml_file import load_yaml
from parallelmind.data.convert.passages import QuestionTemplates, expand_articles, passage_questions
from parallelmind.data.convert.source_records import SourceRecord
from workloads.common.read_config import read_config
from workloads.sweep.command import run_sweep
from workloads.sweep.config import SweepConfig

_COUNTS = (2, 4, 8)  # documents of a record; one holds the answers
_KINDS = ("documents", "concatenated")
_HELD_OUT = 1 / 4  # of the passages, the last ones
_DRAWS = 2  # records of each passage for training, with other documents beside it
_RUNS = Path("runs")
_TEMPLATES = QuestionTemplates(" Question: {question}\nAnswer:", " {answer}")

Passage = tuple[str, list[dict[str, Any]]]  # a text, and its questions as branches
Record = dict[str, Any]


def read_passages(path: Path) -> list[Passage]:
    """The passages of a file in the form of SQuAD, in their order."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    passages: dict[str, list[dict[str, Any]]] = {}
    for record in expand_articles(SourceRecord(str(n), article) for n, article in enumerate(articles)):
        assert isinstance(record, SourceRecord)
        for question in passage_questions(record.value, _TEMPLATES):
            passages.setdefault(question.passage, []).extend([question.branch] if question.branch else [])
    return [(text, questions) for text, questions in passages.items() if questions]


def records(passages: list[Passage], counts: Iterable[int], seed: int) -> Iterator[tuple[list[str], Any]]:
    """For every passage its text among others, in random order, and its questions. counts: of documents."""
    draws = random.Random(seed)
    choices = tuple(counts)
    for text, questions in passages:
        others = [other for other, _ in passages if other != text]
        texts = [text, *draws.sample(others, draws.choice(choices) - 1)]
        draws.shuffle(texts)
        yield texts, questions


def as_documents(texts: list[str], questions: list[Any]) -> Record:
    """The questions stand side by side below the reduce, and read all documents.

    Each document begins with a line break. The first token of a text gets much attention, whatever it is, so
    it should not be a word.
    """
    reduce = {"text": "\n", "targets": [], "rendered": True, "branches": questions}
    return {"documents": [f"\n{text}" for text in texts], "reduce": reduce}


def concatenated(texts: list[str], questions: list[Any]) -> Record:
    """The same texts, with a token after each, as main."""
    return {"main": "".join(f"{text}\n" for text in texts) + "\n", "branches": questions}


_FORMS = dict(zip(_KINDS, (as_documents, concatenated), strict=True))


def write_data(source: Path, folder: Path) -> None:
    """KIND.train.jsonl, and KIND.COUNT.jsonl with the held-out passages; equal records in both kinds."""
    passages = read_passages(source)
    first_held_out = round(len(passages) * (1 - _HELD_OUT))
    train, held_out = passages[:first_held_out], passages[first_held_out:]
    folder.mkdir(parents=True, exist_ok=True)
    for kind, form in _FORMS.items():
        parts = {"train": [row for seed in range(_DRAWS) for row in records(train, _COUNTS, seed)]}
        parts |= {str(count): list(records(held_out, [count], seed=count)) for count in _COUNTS}
        for name, part in parts.items():
            lines = (json.dumps(form(*record), ensure_ascii=False) + "\n" for record in part)
            (folder / f"{kind}.{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def run(*arguments: str) -> None:
    print(*arguments, flush=True)
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def evaluate(trial: Path, kind: str, count: int) -> Row:
    """The scores of an adapter on held-out records with this many documents, kept in a file of its folder."""
    output = trial / f"documents.{count}.json"
    if not output.exists():
        settings = {
            "data_path": _RUNS / "data" / f"{kind}.{count}.jsonl",
            "lora_path": trial / "adapter",
            "dtype": "bfloat16",
            "max_records": 1000,
            "max_new_tokens": 16,
            "show": 0,
            "output_path": output,
        }
        run("workloads.evaluate", "answers", *(f"{key}={value}" for key, value in settings.items()))
    return dict(json.loads(output.read_text(encoding="utf-8")))


def measure(trial: Path) -> list[Row]:
    """A row of an adapter for every number of documents."""
    config = load_yaml(trial / "config.yaml")
    kind = Path(config["data_path"]).name.partition(".")[0]
    rows = []
    for count in _COUNTS:
        scores = evaluate(trial, kind, count)
        own = {name: scores[name] for name in ("questions", "exact_match", "f1")}
        rows.append({"kind": kind, "seed": config["seed"], "documents": count, **own})
    return rows


def key_of(row: Row) -> tuple[int, int, int]:
    """What tells a row from the others, in the order of the table."""
    return _KINDS.index(row["kind"]), row["seed"], row["documents"]


def mean_f1(rows: list[Row], kind: str, count: int) -> float:
    """F1 in points, the mean over seeds."""
    own = [row["f1"] for row in rows if (row["kind"], row["documents"]) == (kind, count)]
    return 100 * fmean(own)


def figure(rows: list[Row]) -> Figure:
    """F1 against the number of documents: a line per kind, a point per seed."""
    fig = Figure(figsize=(6, 4), layout="constrained")
    axes = fig.subplots()
    for kind, colour in zip(_KINDS, ("#2e86ab", "#f18f01"), strict=True):
        own = [row for row in rows if row["kind"] == kind]
        axes.plot(_COUNTS, [mean_f1(rows, kind, count) for count in _COUNTS], color=colour, label=kind)
        axes.scatter([row["documents"] for row in own], [100 * row["f1"] for row in own], color=colour, s=12)
    axes.set(xlabel="documents, one of which holds the answer", ylabel="F1, percent", xticks=_COUNTS)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return fig


def main(source: str, *overrides: str) -> None:
    """Make, train, evaluate; write results/007_documents.csv and .png."""
    if not (_RUNS / "data" / f"{_KINDS[-1]}.{_COUNTS[-1]}.jsonl").exists():
        write_data(Path(source), _RUNS / "data")
    config = read_config(SweepConfig, ["007_documents", *overrides])
    measured = chain.from_iterable(measure(trial) for trial in trained(Path(run_sweep(config).location)))
    rows = updated(RESULTS / "007_documents.csv", measured, key_of)
    figure(rows).savefig(RESULTS / "007_documents.png", dpi=110)
    run("benchmarks", "branches.documents_f1")


if __name__ == "__main__":
    run_command(main)
