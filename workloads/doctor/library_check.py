"""Checks the Python version and the installed libraries."""

from __future__ import annotations

import platform
import shlex
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from workloads.doctor.check import CheckResult
from workloads.doctor.config import DoctorConfig

_PROJECT = "parallelmind"
_REPORTED = ("torch", "transformers", "peft", "ray", "mlflow")  # a problem report should name their versions


class Requirements(NamedTuple):
    """The Python versions and the libraries that the project requires."""

    python: str
    libraries: list[Requirement]


def check_libraries(_: DoctorConfig) -> CheckResult:
    """Whether Python and all libraries have the required versions."""
    required = read_requirements()
    python = f"Python {platform.python_version()}"
    if required is None:
        message = f"{python}; {_PROJECT} is not installed, and this folder has no pyproject.toml of its own"
        return CheckResult("warn", message, "start this in the project's folder")
    if not SpecifierSet(required.python).contains(platform.python_version(), prereleases=True):
        return CheckResult(
            "FAIL", f"{python} is not {required.python}", "run make setup PYTHON=/path/to/another"
        )
    problems = {str(library): problem for library in required.libraries if (problem := _problem(library))}
    if problems:
        remedy = f"run {shlex.join([sys.executable, '-m', 'pip', 'install', *problems])}"
        return CheckResult("FAIL", f"{python}, but {', '.join(problems.values())}", remedy)
    versions = ", ".join(f"{name} {version(name)}" for name in _REPORTED)
    others = len(required.libraries) - len(_REPORTED)
    return CheckResult("ok", f"{python}, {versions} and {others} others meet the requirements")


def read_requirements() -> Requirements | None:
    """The requirements of the installed project, else of its pyproject.toml in the working directory."""
    try:
        python, lines = metadata(_PROJECT)["Requires-Python"], requires(_PROJECT) or []
    except PackageNotFoundError:
        project: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8")).get("project", {})
        if project.get("name") != _PROJECT:
            return None
        python, lines = project["requires-python"], project["dependencies"]
    libraries = [
        library
        for library in map(Requirement, lines)
        if library.marker is None or library.marker.evaluate({"extra": ""})
    ]
    return Requirements(python, libraries)


def _problem(library: Requirement) -> str | None:
    """Why the installed library does not meet the requirement; None if it does."""
    try:
        installed = version(library.name)
    except PackageNotFoundError:
        return f"{library.name} is missing"
    if library.specifier.contains(installed, prereleases=True):
        return None
    return f"{library.name} {installed} is not {library.specifier}"
