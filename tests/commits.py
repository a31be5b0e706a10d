"""Earlier commits of this repository, and Python on their code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A working tree of the commit in `folder`. Skips the test if this clone lacks the commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    added = subprocess.run(
        [*git, "add", "--detach", str(folder), commit], capture_output=True, text=True, check=False
    )
    if added.returncode:
        pytest.skip(f"commit {commit} is not in this clone: {added.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def run_python(root: Path, folder: Path, *arguments: str) -> str:
    """Standard output of Python in `folder`, with the code and tests of `root`. It must succeed."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (root / "platform", root, root / "tests"))),
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
