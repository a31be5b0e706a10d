"""Break the code in known ways, one at a time; the tests must notice: `python -m tools.mutants [NAME ...]`.

Each mutation replaces one piece of source text in a copy of the project and runs the tests that guard it. A
mutation that no test notices survives, and the command fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
_COPIED = (
    "platform",
    "workloads",
    "serving",
    "experiments",
    "benchmarks",
    "tools",
    "tests",
    "pyproject.toml",
)
_LIMIT_S = 300
_PASSED, _FAILED = 0, 1  # exit codes of pytest; others mean that the tests did not run


@dataclass(frozen=True, slots=True)
class Mutation:
    """before: text that occurs once in `file`. after: its replacement. tests: arguments of pytest."""

    name: str
    file: str
    before: str
    after: str
    tests: str

    def apply(self, root: Path) -> None:
        path = root / self.file
        source = path.read_text(encoding="utf-8")
        if source.count(self.before) != 1:
            raise ValueError(
                f"{self.name}: {source.count(self.before)} places in {self.file} match; expected 1"
            )
        path.write_text(source.replace(self.before, self.after), encoding="utf-8")


MUTATIONS = [
    Mutation(
        "data: every epoch shuffles alike",
        "platform/parallelmind/data/packing.py",
        "default_rng([self.seed, self.epoch, *stream])",
        "default_rng([self.seed, *stream])",
        "tests/unit/data/test_packing.py",
    ),
    Mutation(
        "data: padding does not count towards batch_tokens",
        "platform/parallelmind/data/packing.py",
        "(len(samples) + 1) * longest",
        "len(samples) * longest",
        "tests/unit/data/test_packing.py",
    ),
    Mutation(
        "data: a branch without a target is kept",
        "platform/parallelmind/data/tokenise.py",
        "np.array([bool(targets[1:].any()) for _, targets in segments])",
        "np.ones(len(segments), bool)",
        "tests/unit/data/test_tokenise.py",
    ),
    Mutation(
        "data: replaced workers are still served",
        "platform/parallelmind/data/batch_server.py",
        "if assignment.worker_group in self._ended_groups:",
        "if False:",
        "tests/unit/data/test_batch_server.py",
    ),
    Mutation(
        "storage: a file is renamed before it is on disk",
        "platform/parallelmind/storage.py",
        "        fsync(partial)\n",
        "",
        "tests/unit/test_storage.py",
    ),
    Mutation(
        "loss: tokens before answer_offset are targets",
        "platform/parallelmind/layout.py",
        "np.concatenate([lengths[:1], np.broadcast_to(offsets, len(lengths) - 1)])",
        "np.concatenate([lengths[:1], np.zeros(len(lengths) - 1, np.int64)])",
        "tests/unit/test_layout.py",
    ),
    Mutation(
        "loss: the mean is over batches, not over targets",
        "platform/parallelmind/training/step.py",
        "torch._foreach_div_(gradients, targets)",
        "torch._foreach_div_(gradients, 1)",
        "tests/unit/training/test_step.py",
    ),
    Mutation(
        "loss: the gradient is not clipped",
        "platform/parallelmind/training/step.py",
        "(clip / (norm + 1e-6)).clamp(max=1.0)",
        "torch.ones_like(norm)",
        "tests/unit/training/test_step.py",
    ),
    Mutation(
        "mask: isolated branches see their siblings",
        "platform/parallelmind/visibility.py",
        '    if visibility == "columnar":\n',
        "    if True:\n",
        "tests/unit/model/test_mask.py",
    ),
    Mutation(
        "mask: a reduce reads what it joins as siblings",
        "platform/parallelmind/tree.py",
        "row[joined.start : joined.stop] = JOINED",
        "row[joined.start : joined.stop] = SIBLING",
        "tests/unit/test_layout.py",
    ),
    Mutation(
        "mask: heads of a group read the bias of other queries",
        "platform/parallelmind/model/block_attention.py",
        ".repeat(group, 1)",
        ".repeat_interleave(group, 0)",
        "tests/invariants/test_trees.py -k blocks_of_queries",
    ),
    Mutation(
        "data: a reduce is divided from the branches that it reads",
        "platform/parallelmind/tree.py",
        "new.update((segment, *joined[segment]))",
        "new.add(segment)",
        "tests/unit/data/test_packing.py",
    ),
    Mutation(
        "loss: tree_batch leaves a label at the token that predicts it",
        "platform/parallelmind/data/tree_batch.py",
        "np.roll(batch.labels, 1, axis=1)",
        "batch.labels",
        "tests/unit/data/test_tree_batch.py",
    ),
    Mutation(
        "scheduler: a sample does not hold the cached blocks that it reads",
        "platform/parallelmind/engine/scheduler.py",
        "        self.block_manager.hold(block for block, _ in blocks)\n",
        "",
        "tests/unit/engine/test_scheduler.py",
    ),
    Mutation(
        "scheduler: a preempted sample keeps its blocks",
        "platform/parallelmind/engine/scheduler.py",
        "        self.block_manager.free(group.reset())\n        insort",
        "        group.reset()\n        insort",
        "tests/unit/engine/test_scheduler.py",
    ),
    Mutation(
        "scheduler: a cached block is found under another branch coordinate",
        "platform/parallelmind/engine/path_hash.py",
        "        if coordinate != own_coordinate:",
        "        if False:",
        "tests/unit/engine/test_scheduler.py",
    ),
    Mutation(
        "sampler: draws of branches are alike",
        "platform/parallelmind/engine/sampler.py",
        "{row.seed},{row.branch},{row.index}",
        "{row.seed},{row.index}",
        "tests/unit/engine/test_sampler.py",
    ),
    Mutation(
        "checkpoint: a changed weight file counts as complete",
        "platform/parallelmind/training/checkpoint.py",
        "if any(sha256(folder / name) != ",
        "if any(False and sha256(folder / name) != ",
        "tests/unit/training/test_loop_checkpoints.py",
    ),
    Mutation(
        "checkpoint: the optimizer starts anew",
        "platform/parallelmind/training/checkpoint.py",
        "            optimizer.state[parameters[name]][key] = loaded[label]\n",
        "            pass\n",
        "tests/unit/training/test_loop_checkpoints.py",
    ),
    Mutation(
        "sweep: optuna never learns a result",
        "workloads/sweep/optuna_search.py",
        "            study.add_trial(known)\n",
        "            pass\n",
        "tests/unit/workloads/test_sweep.py",
    ),
    Mutation(
        "sweep: a repeated step counts twice",
        "workloads/sweep/journal.py",
        "is_new = step > trial.step",
        "is_new = True",
        "tests/unit/workloads/test_sweep.py",
    ),
    Mutation(
        "documents: what was rotated is rotated again",
        "platform/parallelmind/engine/document_cache.py",
        "            return  # what was rotated twice would be less exact\n",
        "            pass\n",
        "tests/invariants/test_documents.py",
    ),
    Mutation(
        "documents: keys are rotated backwards",
        "platform/parallelmind/engine/document_cache.py",
        "return self.segment.start_time - self.found.start_time",
        "return self.found.start_time - self.segment.start_time",
        "tests/invariants/test_documents.py",
    ),
    Mutation(
        "documents: a document reads main",
        "platform/parallelmind/tree.py",
        "    table[1 : 1 + tree.documents, MAIN] = SIBLING\n",
        "",
        "tests/unit/test_layout.py",
    ),
    Mutation(
        "serving: an abandoned stream is not cancelled",
        "serving/ingress/failover.py",
        "            stream.cancel()\n",
        "            pass\n",
        "tests/unit/serving/test_failover.py",
    ),
    Mutation(
        "serving: a silent engine is waited for without limit",
        "serving/ingress/failover.py",
        "asyncio.timeout(SILENCE_TIMEOUT_S if received else FIRST_MESSAGE_TIMEOUT_S)",
        "asyncio.timeout(None)",
        "tests/unit/serving/test_failover.py",
    ),
    Mutation(
        "serving: any key is valid",
        "serving/ingress/api_keys.py",
        "for known in self._hashes]) > 0",
        "for known in self._hashes]) >= 0",
        "tests/unit/serving/test_request_limits.py",
    ),
]


def main(names: Sequence[str]) -> int:
    """Exit code: 0 if every mutation is noticed."""
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    survivors = 0
    table = Table("mutation", "file", "result", "seconds")
    with _copy() as root:
        for mutation in chosen:
            began = time.monotonic()
            result = _try(mutation, root)
            survivors += result != "killed"
            print(f"{result:9} {mutation.name}", flush=True)
            table.add_row(mutation.name, mutation.file, result, f"{time.monotonic() - began:.0f}")
    Console(width=120).print(table)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors or not chosen else 0


@contextmanager
def _copy() -> Iterator[Path]:
    """A copy of the project's code and tests."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in _COPIED:
            source, target = ROOT / name, Path(folder) / name
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copy(
                source, target
            )
        yield Path(folder)


def _try(mutation: Mutation, root: Path) -> str:
    """killed: the tests pass without the mutation and fail with it."""
    path = root / mutation.file
    original = path.read_text(encoding="utf-8")
    if not _pass_unchanged(mutation.tests, root):
        return "no tests"  # they fail or do not run without the mutation
    mutation.apply(root)
    try:
        return "killed" if _run(mutation.tests, root) == _FAILED else "survived"
    finally:
        path.write_text(original, encoding="utf-8")


@cache
def _pass_unchanged(tests: str, root: Path) -> bool:
    """Whether tests pass without a mutation. Several mutations have the same tests, which run once."""
    return _run(tests, root) == _PASSED


def _run(tests: str, root: Path) -> int:
    """The exit code of pytest in the copy. Tests that do not end within the limit count as failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    env = {
        **os.environ,
        "PYTHONPATH": f"{root / 'platform'}{os.pathsep}{root}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return _FAILED
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
