"""Decoding against other engines, which `make bench-peers` installs.

Each engine is a process of its own, stays loaded, and takes turns with the others. All decode the same text
greedily in one dtype: bfloat16 where the processor computes it, float32 elsewhere. On processors that cannot
run vLLM, the rows against vLLM are measured against another engine, which the recorded command names.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Bench, UnavailableError
from benchmarks.peers import workloads
from benchmarks.peers.install import PEERS, is_installed
from benchmarks.peers.process import (
    EngineProcess,
    start_hf,
    start_openvino,
    start_parallelmind,
    start_vllm,
)
from benchmarks.peers.protocol import Request
from benchmarks.processor import has_avx512, has_native_bfloat16
from parallelmind.config import Dtype, LoraConfig, ModelConfig, RopeConfig
from parallelmind.model.adapter import add_lora, save_adapter
from parallelmind.model.base_model import load_base
from parallelmind.model.patch import patch

_TURNS = 5
_PAUSE = 0.3  # seconds; worker threads of the engine before have stopped spinning then
_ALIKE = 8  # tokens; rounding in bfloat16 separates greedy texts later on
DTYPE: Dtype = "bfloat16" if has_native_bfloat16() else "float32"
_ISOLATED = RopeConfig(visibility="isolated", rope_2d_ratio=0, positions="time")

Work = Callable[[int], list[Request]]

_WORKS: Mapping[str, Work] = {
    "w1": workloads.batch,
    "w2_cold": workloads.shared_main_cold,
    "w2_warm": workloads.shared_main_warm,
    "w3": workloads.one_prompt,
    "w4": workloads.arrivals,
}
# The other engines of each work. The first is the one of the row against vLLM.
_OTHERS: Mapping[str, tuple[str, ...]] = (
    {"w1": ("vllm", "openvino", "hf"), "w2": ("vllm",), "w3": ("vllm", "openvino", "hf"), "w4": ("vllm",)}
    if has_avx512()
    else {"w1": ("openvino", "hf"), "w2": ("hf",), "w3": ("openvino", "hf"), "w4": ("openvino",)}
)
_TITLES = {"hf": "Hugging Face", **{name: peer.title for name, peer in PEERS.items()}}


class Contestant(NamedTuple):
    """An engine and the requests of each of its turns; turn 0 warms up."""

    engine: EngineProcess
    work: Work


class Result(NamedTuple):
    """seconds: median of all turns but the first. tokens: of the last turn, by prompt."""

    seconds: float
    tokens: list[list[int]]


@cache
def engine(name: str) -> EngineProcess:
    """A loaded engine. `parallelmind` is isolated, which is the work of the others; `columnar` does more."""
    settings: dict[str, dict[str, Any]] = {
        "parallelmind": {**_ISOLATED.model_dump(), "dtype": DTYPE},
        "columnar": {"visibility": "columnar", "dtype": DTYPE},
    }
    if name in settings:
        return start_parallelmind(settings[name])
    return {"vllm": start_vllm, "openvino": start_openvino, "hf": start_hf}[name](DTYPE)


def take_turns(contestants: Mapping[str, Contestant]) -> dict[str, Result]:
    """Run all contestants in turn, so that they share the load of the machine."""
    answers: dict[str, list[Any]] = {name: [] for name in contestants}
    for turn in range(_TURNS + 1):
        for name, (process, work) in contestants.items():
            time.sleep(_PAUSE)
            answers[name].append(process.run(work(turn)))
    return {
        name: Result(median(answer.seconds for answer in given[1:]), given[-1].tokens)
        for name, given in answers.items()
    }


def check_equal_work(results: Mapping[str, Result]) -> None:
    """Raise RuntimeError unless all decoded as many tokens, and most of the isolated texts begin alike."""
    ours = results["parallelmind"].tokens
    for name, (_, tokens) in results.items():
        if list(map(len, tokens)) != list(map(len, ours)):
            raise RuntimeError(f"{name}: decoded {list(map(len, tokens))} tokens, not {list(map(len, ours))}")
        if name != "columnar" and 2 * count_alike(tokens, ours) < len(ours):
            raise RuntimeError(f"{name}: most of its texts begin otherwise than those of parallelmind")


def count_alike(left: Sequence[list[int]], right: Sequence[list[int]]) -> int:
    """Texts that begin with the same tokens."""
    return sum(one[:_ALIKE] == other[:_ALIKE] for one, other in zip(left, right, strict=True))


@cache
def measure(work: str) -> dict[str, Result]:
    """Measure one work on all engines that are installed."""
    others = [name for name in _OTHERS[work[:2]] if _is_available(name)]
    names = ["parallelmind", *(["columnar"] if work == "w1" else []), *others]
    results = take_turns({name: Contestant(engine(name), _WORKS[work]) for name in names})
    check_equal_work(results)
    _print(work, results)
    return results


def _print(work: str, results: Mapping[str, Result]) -> None:
    ours = next(iter(results.values())).tokens
    figures = ", ".join(
        f"{_TITLES.get(name, name)} {result.seconds:.3f} s ({count_alike(result.tokens, ours)} alike)"
        for name, result in results.items()
    )
    print(f"{work} of {len(ours)} texts: {figures}; load {os.getloadavg()[0]:.1f}", file=sys.stderr)


def _is_available(name: str) -> bool:
    return name == "hf" or is_installed(name)


def _speedup(work: str, other: str) -> float:
    if not _is_available(other):
        raise UnavailableError(f"{_TITLES[other]} is not installed; run make bench-peers")
    results = measure(work)
    return results[other].seconds / results["parallelmind"].seconds


def _columnar_speed() -> float:
    results = measure("w1")
    return results["parallelmind"].seconds / results["columnar"].seconds


def _adapters_speed() -> float:
    """Speed with eight adapters in one batch over speed with one of them."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = _save_random_adapters(Path(folder))
        process = start_parallelmind({**_ISOLATED.model_dump(), "dtype": DTYPE}, adapters)
    contestants = {
        "one adapter": Contestant(process, workloads.one_adapter),
        "eight adapters": Contestant(process, workloads.eight_adapters),
    }
    results = take_turns(contestants)
    process.close()
    _print("adapters", results)
    return results["one adapter"].seconds / results["eight adapters"].seconds


def _save_random_adapters(folder: Path) -> list[Path]:
    """Save adapters named "0", "1", … that change the text."""
    base, lora = ModelConfig(), LoraConfig()
    model, tokenizer = load_base(base)
    patch(model, _ISOLATED)
    adapted, folders = add_lora(model, lora, seed=0), []
    for number in range(workloads.ADAPTERS):
        torch.manual_seed(number)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        folders.append(folder / str(number))
        save_adapter(adapted, tokenizer, folders[-1], base, _ISOLATED, lora)
    return folders


def _row(name: str, target: float | None, work: str, other: str) -> Bench:
    conditions = f"{DTYPE}, {_TITLES[other]}"
    return Bench(f"decoding.{name}", target, "higher", "ratio", partial(_speedup, work, other), conditions)


def _own_row(name: str, target: float, measured: Callable[[], float]) -> Bench:
    return Bench(f"decoding.{name}", target, "higher", "ratio", measured, DTYPE)


BENCHES = [
    _row("w1_vs_vllm", 1, "w1", _OTHERS["w1"][0]),
    _own_row("w1_columnar_vs_isolated", 0.9, _columnar_speed),
    _row("w2_vs_vllm_cold", 1.3, "w2_cold", _OTHERS["w2"][0]),
    _row("w2_vs_vllm_warm", 1.5, "w2_warm", _OTHERS["w2"][0]),
    _row("w3_vs_vllm", 1, "w3", _OTHERS["w3"][0]),
    _row("w4_vs_vllm", 1, "w4", _OTHERS["w4"][0]),
    _row("w1_vs_hf", 2, "w1", "hf"),
    _row("w3_vs_hf", 2, "w3", "hf"),
    _row("w1_vs_openvino", None, "w1", "openvino"),
    _row("w3_vs_openvino", None, "w3", "openvino"),
    _own_row("adapters8_vs_one", 0.8, _adapters_speed),
]
