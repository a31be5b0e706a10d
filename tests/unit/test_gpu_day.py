"""`make gpu-day` in small, on a CPU: every part has figures, and a second call goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_day

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", [name for name in gpu_day.PARTS if name != "tests"])
def test_a_part_has_figures(name: str) -> None:
    figures = gpu_day.PARTS[name].measure(gpu_day.SMALL)
    assert figures
    assert all(value > 0 for value in figures.values())


def test_a_second_call_goes_on_where_the_first_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(name: str, seconds: float) -> dict[str, Any]:
        assert 0 < seconds <= gpu_day.PARTS[name].seconds
        ran.append(name)
        if name == "training_7b" and ran.count(name) == 1:
            return {"error": "CUDA out of memory"}
        if name == "decoding" and ran.count(name) == 1:
            raise KeyboardInterrupt
        return {"figures": {f"{name}_tokens_per_s": 12345.678}}

    results = tmp_path / "day.json"
    with pytest.raises(KeyboardInterrupt):
        gpu_day.run_parts(results, "some GPU", run)
    assert "| training_7b | CUDA out of memory |" in results.with_suffix(".md").read_text()
    assert gpu_day.run_parts(results, "some GPU", run)
    assert ran[4:] == ["training_7b", "decoding", "decoding_lora"]
    assert gpu_day.run_parts(results, "some GPU", run)
    assert len(ran) == 7
    assert set(json.loads(results.read_text())["parts"]) == set(gpu_day.PARTS)
    assert "| decoding_tokens_per_s | 1.235e+04 |" in results.with_suffix(".md").read_text()
    monkeypatch.setattr(gpu_day, "_SECONDS", 0.0)
    assert not gpu_day.run_parts(results, "another GPU", run), "its time is over before the first part"


@pytest.mark.slow
def test_the_command_writes_figures_and_a_table(tmp_path: Path) -> None:
    results = tmp_path / "day.json"
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--small", "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = json.loads(results.read_text())["parts"]
    assert parts["tests"]["figures"] == {"tests passed": 1, "tests failed": 0}
    assert "training.gpu_7b_tokens_per_s" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="has an accelerator")
def test_without_a_gpu_the_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_day"])
    with pytest.raises(SystemExit, match="2"):
        gpu_day.main()
    assert capsys.readouterr().err.startswith("error: torch finds no CUDA device; ")


def test_a_share_of_the_peak_is_told_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_day, "_device_name", lambda device: "NVIDIA H200")
    figures = gpu_day.train("05b", gpu_day.SMALL)
    assert figures.keys() == {"training.gpu_05b_tokens_per_s", "training.gpu_05b_mfu"}
    assert 0 < figures["training.gpu_05b_mfu"] < 1
