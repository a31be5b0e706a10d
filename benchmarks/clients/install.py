"""`make clients`: install the clients that call this server, in a venv and a node folder below `$CLIENTS`.

They lie outside the project's venv because they pin versions of shared dependencies. What they lack, such as
transformers, is imported from the project's venv.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.clients.catalog import client_python, folder
from parallelmind.errors import UserError

REQUIREMENTS = (
    "langchain-openai==1.7.4",
    "litellm==1.110.2",
    "lm-eval[api]==0.4.13",
    "openai==3.57.0",
    "pydantic-ai-slim[openai]==2.68.0",
)
NODE_PACKAGES = ("openai@7.59.0",)


def is_installed() -> bool:
    """Whether `install` has completed with these versions."""
    return _stamp().is_file() and _stamp().read_text(encoding="utf-8") == _contents()


def install() -> None:
    """Install all clients. Raises UserError if pip or npm fails."""
    python = str(client_python())
    _run([sys.executable, "-m", "venv", "--clear", str(folder())])
    _run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS])
    own = _output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    Path(own, "zz_project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    if npm := shutil.which("npm"):
        node = folder() / "node"
        node.mkdir()
        _run([npm, "install", "--silent", "--no-audit", "--no-fund", f"--prefix={node}", *NODE_PACKAGES])
    _stamp().write_text(_contents(), encoding="utf-8")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise UserError(f"{' '.join(command)}: exit code {done.returncode}; its output is above")


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _stamp() -> Path:
    return folder() / "installed.txt"


def _contents() -> str:
    return "\n".join([*REQUIREMENTS, *NODE_PACKAGES])


def main() -> None:
    if is_installed():
        print(f"installed in {folder()}")
        return
    print(f"installing in {folder()}, some minutes", flush=True)
    install()
    print("installed")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
