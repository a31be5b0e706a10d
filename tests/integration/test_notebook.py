"""The notebook runs from its first cell to its last, with a tiny model."""

from pathlib import Path

import nbformat
import pytest
from docs import ROOT
from nbconvert.preprocessors import ExecutePreprocessor
from tiny import save_tiny

NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"

pytestmark = pytest.mark.slow


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/platform:{ROOT}")
    base = save_tiny(tmp_path / "tiny")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in notebook.cells if "BASE = " in cell.source)
    settings.source += f"\nBASE, STEPS = {str(base)!r}, 2"
    ExecutePreprocessor(timeout=300).preprocess(notebook, {"metadata": {"path": tmp_path}})
    outputs = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert "prompt" in outputs[1]
    assert outputs[-1].count(":") >= 5, "the branch that joined has text, too"
