"""Running the setup commands of ray_cluster.yaml in a folder of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servers import ROOT


def write_command(path: Path, line: str) -> None:
    """Write an executable of one line of shell."""
    path.write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
    path.chmod(0o755)


def run_setup(commands: Sequence[str], config: dict[str, Any], home: Path, binaries: Path) -> None:
    """Run commands as on a new node: in an empty home folder with the files that `ray up` copies.

    binaries: folder of the commands that come before those of this machine.
    """
    for remote, local in config["file_mounts"].items():
        if not local.startswith("~"):
            path = home / remote.removeprefix("~/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((ROOT / local).read_bytes())
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    env = {**pip, "HOME": str(home), "PATH": f"{binaries}:{os.environ['PATH']}"}
    for command in commands:
        subprocess.run(["bash", "-ec", command], env=env, check=True)
