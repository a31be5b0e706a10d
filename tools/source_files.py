"""Table of docs/architecture.md: every source file with the first line of its docstring.

Usage: python -m tools.source_files
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tools.marked import fill

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PART = "files"
PACKAGES = ("platform/parallelmind", "workloads", "serving")


def source_files() -> str:
    """Return one table per folder as Markdown."""
    folders = [folder for package in PACKAGES for folder in _folders(ROOT / package)]
    return "\n\n".join(_table(folder) for folder in folders if _files(folder))


def _folders(folder: Path) -> Iterator[Path]:
    """Yield a folder and its packages, depth first."""
    yield folder
    for child in sorted(folder.iterdir()):
        if (child / "__init__.py").is_file():
            yield from _folders(child)


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.py")) if file.stem not in ("__init__", "__main__")]


def _table(folder: Path) -> str:
    rows = [f"| {file.name} | {summary(file)} |" for file in _files(folder)]
    header = f"| `{folder.relative_to(ROOT).as_posix()}/` | {summary(folder / '__init__.py')} |"
    return "\n".join([header, "| --- | --- |", *rows])


def summary(file: Path) -> str:
    """Return the first paragraph of a module's docstring in one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    fill(PAGE, PART, source_files())
