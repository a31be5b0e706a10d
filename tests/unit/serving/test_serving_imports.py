"""The server does not depend on the library's checks and fixtures."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SERVING = Path(__file__).resolve().parents[3] / "serving"
FIXTURES = ("laws", "probes", "tiny_models")


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules and of the names imported from them, lazy imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(SERVING.rglob("*.py")), ids=lambda path: path.stem)
def test_serving_imports_no_laws_and_no_tiny_models(path: Path) -> None:
    forbidden = tuple(f"parallelmind.evaluation.{name}" for name in FIXTURES)
    assert not [
        name for name in imported_modules(path) if f"{name}.".startswith(tuple(f"{f}." for f in forbidden))
    ]
