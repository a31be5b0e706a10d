"""`make gpu-day`: what waits for a GPU, in at most nine minutes: tests, training and decoding.

Every part is a process of its own, and its figures are written when it ends. A call that was interrupted, or
whose time was over, is continued by the next one; a part that failed is repeated. The figures are written to
experiments/results/gpu_day.json, and as a table for experiments/LOG.md beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_decoding, harness
from benchmarks.gpu import SHAPES, WORKLOADS, Shape, Workload, build, measure, peak, qwen
from benchmarks.gpu_lora import against_vllm
from benchmarks.processor import machine

RESULTS = harness.RESULTS.with_name("gpu_day.json")
_SECONDS = 530.0  # of one call
_LEAST = 30.0  # seconds; a part is not begun with less

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is.

    tests: arguments of pytest. main, tokens: of the decoding benchmarks.
    """

    device: str
    tests: tuple[str, ...]
    shapes: Mapping[str, Shape]
    workloads: Mapping[str, Workload]
    main: int
    tokens: int


FULL = Scale("cuda", ("tests/gpu", "-m", "gpu"), SHAPES, WORKLOADS, main=1024, tokens=64)
# Heads of 32 are the smallest that vLLM runs on a CPU.
_TINY = Shape(qwen(300, 64, 128, 4, 2, 1, tied=True), checkpointing=False)
SMALL = Scale(
    "cpu",
    ("tests/gpu/test_benchmark.py", "-k", "peaks"),
    {"05b": _TINY, "7b": _TINY},
    {"": Workload("columnar", 8, 4, rows=2)},
    main=32,
    tokens=2,
)


@dataclass(frozen=True, slots=True)
class Part:
    """measure: returns figures by name. seconds: the most that it may take."""

    measure: Callable[[Scale], Figures]
    seconds: float


class _Outcomes:
    """A plugin of pytest that counts tests."""

    passed = failed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed
        self.failed += report.failed


def run_tests(scale: Scale) -> Figures:
    """The numbers of tests that passed and failed."""
    outcomes = _Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", *scale.tests], plugins=[outcomes])
    return {"tests passed": outcomes.passed, "tests failed": outcomes.failed}


def train(shape: str, scale: Scale) -> Figures:
    """Tokens/s of LoRA steps, and the share of the GPU's peak that they compute, for every workload."""
    model, figures = build(scale.shapes[shape], scale.device), {}
    top = peak(_device_name(scale.device))
    for name, work in scale.workloads.items():
        speed = measure(model, work)
        figures[f"training.gpu_{shape}{name}_tokens_per_s"] = speed.tokens
        if top is not None:
            figures[f"training.gpu_{shape}{name}_mfu"] = speed.flops / top
    return figures


def decode(scale: Scale) -> Figures:
    """Decoding of sixteen branches against Hugging Face."""
    config = scale.shapes["05b"].config
    rows = gpu_decoding.benches(config, scale.device, main=scale.main, tokens=scale.tokens)
    return {row.name: row.measure() for row in rows}


def decode_with_adapter(scale: Scale) -> Figures:
    """Decoding of sixteen texts with one LoRA adapter, and against vLLM where it is installed."""
    return against_vllm(scale.shapes["05b"].config, scale.device, scale.tokens)


PARTS = {
    "tests": Part(run_tests, 180),
    "training_05b": Part(partial(train, "05b"), 120),
    "training_7b": Part(partial(train, "7b"), 180),
    "decoding": Part(decode, 120),
    "decoding_lora": Part(decode_with_adapter, 150),
}


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def run_parts(results: Path, device: str, run: Callable[[str, float], dict[str, Any]]) -> bool:
    """Run the parts without figures and write every result at once. Returns whether all have figures.

    results: JSON of earlier calls on the same device; another device starts anew. run: runs a part by name,
    in a number of seconds.
    """
    day = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    if day.get("device") != device:
        day = {"device": device, "machine": machine(), "torch": torch.__version__, "parts": {}}
    end = time.monotonic() + _SECONDS
    for name, part in PARTS.items():
        left = end - time.monotonic()
        if "figures" in day["parts"].get(name, {}) or left < _LEAST:
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        day["parts"][name] = run(name, min(left, part.seconds)) | {"date": str(date.today())}
        results.write_text(json.dumps(day, indent=1) + "\n", encoding="utf-8")
        results.with_suffix(".md").write_text(table(day), encoding="utf-8")
    return all("figures" in day["parts"].get(name, {}) for name in PARTS)


def table(day: Mapping[str, Any]) -> str:
    """The figures, and the errors of parts that failed, in Markdown."""
    head = f"{day['device']}, torch {day['torch']}, {day['machine']}"
    lines = [head, "", "| figure | value |", "| --- | ---: |"]
    for name, part in day["parts"].items():
        values = part.get("figures") or {name: part["error"]}
        lines += [
            f"| {label} | {value if isinstance(value, str) else format(value, '.4g')} |"
            for label, value in values.items()
        ]
    return "\n".join(lines) + "\n"


def run_process(small: bool, name: str, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own: its figures, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--part", name, *(["--small"] if small else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {seconds:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return {"figures": json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_day", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the figures")
    parser.add_argument("--part", choices=list(PARTS), help="run one part and print its figures")
    options = parser.parse_args()
    scale = SMALL if options.small else FULL
    if scale.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no CUDA device; run make gpu-day on a machine with a GPU", file=sys.stderr)
        sys.exit(2)
    if options.part:
        print(json.dumps(PARTS[options.part].measure(scale)))
        return
    complete = run_parts(options.results, _device_name(scale.device), partial(run_process, options.small))
    print(options.results.with_suffix(".md").read_text(encoding="utf-8"))
    if not complete:
        print("some parts have no figures; run the same command again to measure them", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
