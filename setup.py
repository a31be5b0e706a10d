"""Build of the wheel: it installs `parallelmind` alone, with the programs as subpackages.

In the project's folder `workloads`, `serving` and `experiments` are packages of their own, which
`python -m workloads.train` and `ray job submit` run. At the top level of site-packages such names could
collide with others; so the wheel has `parallelmind.workloads` and so on, with their imports rewritten.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROGRAMS = ("workloads", "serving", "experiments")
IMPORTS = re.compile(rf"^( *)(from|import) (?=(?:{'|'.join(PROGRAMS)})\b)", re.MULTILINE)


class NestedBuild(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            nest_programs(Path(self.build_lib))


def nest_programs(folder: Path) -> None:
    """Move the programs into the library, and make every import of them say so."""
    for name in PROGRAMS:
        target = folder / "parallelmind" / name
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        shutil.move(folder / name, target)
    for file in (folder / "parallelmind").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        file.write_text(IMPORTS.sub(r"\1\2 parallelmind.", text), encoding="utf-8")


setup(cmdclass={"build_py": NestedBuild})
