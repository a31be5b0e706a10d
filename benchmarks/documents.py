"""Time to the first token of a question on eight documents that are cached, in another order.

The documents are the branches of one sample. An engine with a prefix cache alone reads them as one text, and
finds nothing of it, because its first document is another one. How well the questions are answered is read
from the results of `experiments._documents`.
"""

from __future__ import annotations

import os
import sys
from functools import cache, partial

from benchmarks.comparison import DTYPE, Contestant, Result, take_turns
from benchmarks.harness import Bench, UnavailableError
from benchmarks.peers import workloads
from benchmarks.peers.install import is_installed
from benchmarks.peers.process import EngineProcess, start_parallelmind, start_vllm
from benchmarks.processor import has_avx512
from benchmarks.result_table import ResultTable
from parallelmind.config import RopeConfig

_TABLE = ResultTable("007_documents.csv", "python -m experiments._documents path/to/xquad.en.json")
_ROPE = RopeConfig(visibility="isolated", positions="time")


@cache
def _measured() -> dict[str, Result]:
    """In every turn each engine first reads new documents, then the same ones in another order."""
    engines: dict[str, EngineProcess] = {
        "parallelmind": start_parallelmind({**_ROPE.model_dump(), "dtype": DTYPE})
    }
    if is_installed("vllm") and has_avx512():
        engines["vLLM"] = start_vllm(DTYPE)
    contestants = {}
    for name, process in engines.items():
        contestants[f"{name}, new"] = Contestant(process, workloads.new_documents)
        contestants[f"{name}, reordered"] = Contestant(process, workloads.reordered_documents)
    results = take_turns(contestants)
    figures = ", ".join(f"{name} {1e3 * result.seconds:.1f} ms" for name, result in results.items())
    print(f"first token after documents: {figures}; load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return results


def _ratio(slower: str, faster: str) -> float:
    results = _measured()
    if slower not in results:
        raise UnavailableError("vLLM is not installed, or does not run here; run make bench-peers")
    return results[slower].seconds / results[faster].seconds


def _row(name: str, target: float, slower: str) -> Bench:
    measure = partial(_ratio, slower, "parallelmind, reordered")
    return Bench(f"branches.documents_{name}", target, "higher", "ratio", measure, DTYPE)


def _f1_difference() -> float:
    """F1 of documents minus F1 of the same texts as one, in points; the lower of 4 and 8 documents."""

    def mean(kind: str, count: int) -> float:
        return 100 * _TABLE.mean("f1", kind=kind, documents=count)

    return min(mean("documents", count) - mean("concatenated", count) for count in (4, 8))


BENCHES = [
    Bench(
        "branches.documents_f1_vs_concatenated",
        -1,
        "higher",
        "points",
        _f1_difference,
        "results of python -m experiments._documents: bfloat16, means over seeds, lower of 4 and 8 documents",
    ),
    _row("ttft_vs_prefill", 10, "parallelmind, new"),
    _row("ttft_vs_vllm", 5, "vLLM, reordered"),
]
