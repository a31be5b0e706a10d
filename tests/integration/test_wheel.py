"""The wheel is complete: it works without the repository and without an editable install."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import clusters
import pytest
from servers import ROOT
from tiny import save_tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the files tracked by git."""
    folder = tmp_path_factory.mktemp("wheel")
    names = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
        .stdout.decode()
        .split("\0")
    )
    for name in filter(None, names):
        if (source := ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", folder]
    command = [sys.executable, "-m", "pip", "wheel", *options, folder / "source"]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_contains_packages_and_data_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"parallelmind", "workloads", "serving", "experiments"}
    for folder in ("platform/parallelmind", "workloads", "serving"):
        root = (ROOT / folder).parent if folder.startswith("platform") else ROOT
        files = [
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        assert {path.relative_to(root).as_posix() for path in files} <= names


@pytest.mark.full
def test_commands_run_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    python, folder = clusters.bare_python(tmp_path / "bare"), tmp_path / "elsewhere"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "site", wheel]
    subprocess.run(command, check=True, capture_output=True)
    save_tiny(folder / "tiny")
    env = {**clusters.environment(python), "PYTHONPATH": str(folder / "site")}

    def output(*arguments: str) -> str:
        completed = subprocess.run(
            [python, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    assert str(folder / "site") in output(
        "-c", "import parallelmind, serving.app; print(parallelmind.__file__)"
    )
    assert "lora_rank" in output("-m", "workloads.train", "--help")
    assert output("-m", "workloads.generate", "base_model=tiny", "prompt=the", "max_new_tokens=2")
