"""LoRA training against TRL's SFTTrainer, which `make bench-peers` installs.

Both train the same model on the same tokens, one after the other, in float32, the default of this project.
What counts is the second of two epochs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Bench, UnavailableError
from benchmarks.learner import long_samples
from benchmarks.peers.install import is_installed
from benchmarks.peers.process import base_model, peer_python
from benchmarks.peers.training_work import TrainingWork
from benchmarks.text import passages

_BRANCH, _DTYPE = 32, "float32"


def plain_rows() -> float:
    """Tokens/s over TRL's, for rows without a main: both pack them into rows of 1,024 tokens."""
    rows: list[tuple[list[int], list[list[int]]]] = [([], [main]) for main, _ in passages(48)]
    return _speedup(TrainingWork(rows, packed_tokens=1024))


def shared_main() -> float:
    """Branches/s over TRL's, for mains of 512 tokens with eight branches of 32 tokens."""
    samples = [sample.split() for sample in long_samples(1, _BRANCH)]
    return _speedup(TrainingWork([(main, branches) for main, *branches in samples]))


def _speedup(work: TrainingWork) -> float:
    if not is_installed("trl"):
        raise UnavailableError("TRL is not installed; run make bench-peers")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.json"
        work.write(path)
        trl = _seconds(peer_python("trl"), "trl_driver", base_model(), _DTYPE, str(path))
        return trl / _seconds(sys.executable, "training_driver", _DTYPE, str(path))


def _seconds(python: str, driver: str, *arguments: str) -> float:
    """What a driver prints. It uses all cores."""
    completed = subprocess.run(
        [python, "-m", f"benchmarks.peers.{driver}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(completed.stdout.split()[-1])


BENCHES = [
    Bench("training.lora_vs_trl", 1.0, "higher", "ratio", plain_rows, _DTYPE),
    Bench("training.shared_main_vs_trl", 4.0, "higher", "ratio", shared_main, _DTYPE),
]
