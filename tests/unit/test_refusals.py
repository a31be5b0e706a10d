"""A command refuses these mistakes without importing Ray or a model library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from docs import ROOT

from tools.mistakes import outcome
from tools.refusals import COMMANDS, first_cells, prepare_folder

SCRIPT = """
import json, sys
from parallelmind.errors import UserError
from workloads.__main__ import run_command
for command in json.loads(sys.argv[1]):
    try:
        run_command(command.split())
    except UserError as error:
        print(error)
    else:
        print(f"{command}: not refused")
    heavy = {"torch", "transformers", "peft", "ray", "mlflow"} & sys.modules.keys()
    assert not heavy, (command, heavy)
"""


def test_twenty_mistakes_are_told_without_heavy_imports(tmp_path: Path) -> None:
    assert len(COMMANDS) == 20
    env = {**os.environ, **prepare_folder(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(COMMANDS)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(COMMANDS)
    assert not [line for line in lines if line.endswith("not refused")]
    page = (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8")
    for command, line in zip(COMMANDS, lines, strict=True):
        text = outcome(2, f"error: {line}", tmp_path).text
        assert first_cells(command, text) in page, "run make docs"
