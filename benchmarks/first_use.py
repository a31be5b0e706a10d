"""First use as README describes it: `git clone` and `make demo`, with empty caches and no installation."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.harness import Bench, UnavailableError
from tools import refusals

_PIP_SOURCES = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_FIND_LINKS",
)  # without these variables pip reads PyPI
_TORCH = "torch", "nvidia", "triton", "cuda"  # folders
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of first use. megabytes: disk use afterwards, caches included. torch_megabytes: of torch in it."""

    commands: int
    minutes: float
    megabytes: float
    torch_megabytes: float


@cache
def _cost() -> Cost:
    with tempfile.TemporaryDirectory() as name:
        folder, caches = Path(name) / "parallelmind", Path(name) / "caches"
        commands = [["git", "clone", "--quiet", str(_ROOT), str(folder)], ["make", "demo"]]
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS")
        }
        env = {**inherited, "XDG_CACHE_HOME": str(caches), "PARALLELMIND_CACHE": str(caches / "parallelmind")}
        started = time.perf_counter()
        for command in commands:
            directory = folder if folder.exists() else name
            subprocess.run(command, cwd=directory, env=env, check=True, stdout=subprocess.DEVNULL)
        minutes = (time.perf_counter() - started) / 60
        return Cost(len(commands), minutes, _megabytes(Path(name)), _torch_megabytes(folder / ".venv"))


def _torch_megabytes(environment: Path) -> float:
    """Disk use of torch and of what its wheel for CUDA brings along."""
    [packages] = environment.glob("lib/python3*/site-packages")
    return sum(map(_megabytes, [folder for name in _TORCH for folder in packages.glob(name)]))


def _cuda_megabytes() -> float:
    """Disk use with PyPI's torch, which is the one for CUDA, whatever the index of this machine gives.

    Raises:
        UnavailableError: PyPI cannot be reached.
    """
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, with_pip=True)
        env = {key: value for key, value in os.environ.items() if key not in _PIP_SOURCES}
        pip = [f"{name}/bin/pip", "install", "--no-cache-dir"]
        torch = f"torch=={version('torch').partition('+')[0]}"
        completed = subprocess.run([*pip, torch], env={**env, "PIP_CONFIG_FILE": os.devnull}, check=False)
        if completed.returncode:
            raise UnavailableError("torch for CUDA cannot be installed from PyPI")
        return _cost().megabytes - _cost().torch_megabytes + _torch_megabytes(Path(name))


def _readme_lines() -> int:
    return len((_ROOT / "README.md").read_text(encoding="utf-8").splitlines())


def _blocks_run() -> float:
    """Share of the commands and Python blocks of all pages that run, those that need a network left out.

    Raises:
        UnavailableError: a test of the pages ended without a report.
    """
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.xml"
        tests = ["tests/integration/test_docs_run.py", "-k", "every_block", "-m", "", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=_ROOT, check=False)
        if not report.exists():
            raise UnavailableError("the tests of the pages wrote no report")
        examples = passed = 0
        for case in ElementTree.parse(report).iter("testcase"):
            counts = {item.attrib["name"]: int(item.attrib["value"]) for item in case.iter("property")}
            own = counts["examples"] - counts["not_here"]
            examples += own
            passed += own * (case.find("failure") is None)
        return passed / examples


def _megabytes(folder: Path) -> float:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()) / 1e6


BENCHES = [
    Bench("first_use.readme_lines", 170, "lower", "lines", _readme_lines),
    Bench(
        "first_use.blocks_run", 1.0, "higher", "ratio", _blocks_run, "commands that need a network left out"
    ),
    Bench("first_use.commands", 2, "lower", "commands", lambda: _cost().commands),
    Bench("first_use.minutes", None, "lower", "min", lambda: _cost().minutes),
    Bench("first_use.megabytes", None, "lower", "MB", lambda: _cost().megabytes),
    Bench("first_use.megabytes_cuda", None, "lower", "MB", _cuda_megabytes),
    Bench("first_use.slowest_refusal_s", 2.0, "lower", "s", refusals.slowest_s),
]
