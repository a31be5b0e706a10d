"""Files that an earlier version of the project wrote still load, and what it interrupted still resumes.

`tests/fixtures/earlier_version` is a working directory of commit 5e891a1: a finished adapter and a finished
full model, a stopped training run, a stopped sweep and a half-written output of `workloads.generate`.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from adapting import logits
from commits import ROOT, checkout, run_python
from safetensors.torch import load_file

import parallelmind as pm
from parallelmind.errors import UserNotice

COMMIT = "5e891a1"
WRITTEN = ROOT / "tests" / "fixtures" / "earlier_version"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text(encoding="utf-8"))
ADAPTER, MODEL = Path("runs/whole-8c420000/adapter"), Path("runs/full-825d8e60/model")
STOPPED, SWEEP = Path("runs/stopped-199a1611"), Path("runs/swept-71f296cc")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the working directory, which is the current one. Absolute paths point into the copy."""
    copy = tmp_path / "work"
    shutil.copytree(WRITTEN, copy)
    for path in [copy / SWEEP / "journal.jsonl", *copy.glob(f"{SWEEP}/trials/*/config.yaml")]:
        path.write_text(_placed(path.read_text(encoding="utf-8"), copy), encoding="utf-8")
    with closing(sqlite3.connect(copy / "mlflow.db")) as database:
        database.executescript(_placed(gzip.decompress((copy / "mlflow.sql.gz").read_bytes()).decode(), copy))
    monkeypatch.chdir(copy)
    return copy


def _placed(text: str, folder: Path) -> str:
    return text.replace("@FOLDER@", str(folder))


def run(folder: Path, *command: str, root: Path = ROOT) -> str:
    """Standard output of `python -m command` with the code in `root`, which must succeed."""
    return run_python(root, folder, "-m", *command)


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_trained_weights_give_the_same_logits(folder: Path, kind: str) -> None:
    if kind == "adapter":
        with pytest.warns(UserNotice, match="an earlier version saved this adapter and recorded less"):
            model, tokenizer = pm.load_model_with_lora(base_model="base", lora_path=str(ADAPTER))
    else:
        model, tokenizer = pm.load_model_with_lora(base_model=str(MODEL))
    torch.testing.assert_close(logits(model.eval())[0, -1].tolist(), EXPECTED[kind], atol=1e-4, rtol=1e-4)
    sample = pm.Sample(main="the passage", branches=["who ", "works"])
    assert pm.generate(model, tokenizer, sample, max_new_tokens=8) == EXPECTED[f"{kind}_text"]


@pytest.mark.slow
def test_a_half_written_output_is_continued(folder: Path) -> None:
    run(
        folder,
        "workloads.generate",
        "base_model=base",
        f"lora_path={ADAPTER}",
        "data_path=prompts.jsonl",
        "max_new_tokens=16",
        "ignore_eos=true",
        "output_path=part.jsonl",
    )
    assert Path("part.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.slow
def test_a_stopped_run_resumes_and_ends_like_one_that_was_not_stopped(folder: Path) -> None:
    output = run(folder, "workloads.train", "run.yaml", "name=stopped")
    assert f"resuming from {folder / STOPPED / 'checkpoints' / 'step-7'}" in output
    assert "step 8/14" in output
    assert "step 7/14" not in output
    resumed, undisturbed = load_file(STOPPED / "adapter" / WEIGHTS), load_file(ADAPTER / WEIGHTS)
    torch.testing.assert_close(resumed, undisturbed, atol=1e-4, rtol=1e-4)  # processors round differently


@pytest.mark.full
@pytest.mark.slow
def test_a_stopped_sweep_resumes_its_unfinished_trial(folder: Path) -> None:
    before = (SWEEP / "journal.jsonl").read_text(encoding="utf-8")
    output = run(folder, "workloads.sweep", "sweep.yaml")
    assert "trials   2 finished" in output
    after = (SWEEP / "journal.jsonl").read_text(encoding="utf-8")
    assert after.startswith(before)
    events = [json.loads(line) for line in after.splitlines()]
    reported = Counter((event["trial"], event["step"]) for event in events if "metrics" in event)
    assert set(reported.values()) == {1}
    assert {event["trial"] for event in events[len(before.splitlines()) :] if "trial" in event} == {1}


@pytest.fixture
def earlier_code(tmp_path: Path) -> Iterator[Path]:
    """A checkout of the earlier commit."""
    with checkout(COMMIT, tmp_path / "earlier") as root:
        yield root


@pytest.mark.full
@pytest.mark.slow
def test_both_versions_end_a_stopped_run_with_the_same_weights(folder: Path, earlier_code: Path) -> None:
    shutil.copytree(folder, folder.parent / "other")
    run(folder, "workloads.train", "run.yaml", "name=stopped")
    run(folder.parent / "other", "workloads.train", "run.yaml", "name=stopped", root=earlier_code)
    here, there = (work / STOPPED / "adapter" / WEIGHTS for work in (folder, folder.parent / "other"))
    assert here.read_bytes() == there.read_bytes()
