"""What is packed works where there is nothing else of this project: neither its files, nor its editable
install.
"""

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
    """Built from the files that git knows."""
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
    line = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        folder / "source",
    ]
    subprocess.run(line, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_it_holds_the_packages_and_what_they_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"parallelmind", "workloads", "serving", "experiments"}
    for folder in ("platform/parallelmind", "workloads", "serving"):
        root = (ROOT / folder).parent if folder.startswith("platform") else ROOT
        files = [
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        assert {path.relative_to(root).as_posix() for path in files} <= names


def test_it_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    python, place = clusters.bare_python(tmp_path / "bare"), tmp_path / "elsewhere"
    line = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place / "site", wheel]
    subprocess.run(line, check=True, capture_output=True)
    save_tiny(place / "tiny")
    env = {**clusters.environment(python), "PYTHONPATH": str(place / "site")}

    def said(*line: str) -> str:
        done = subprocess.run(
            [python, *line], cwd=place, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(place / "site") in said("-c", "import parallelmind, serving.app; print(parallelmind.__file__)")
    assert "lora_rank" in said("-m", "workloads.train", "--help")
    assert said("-m", "workloads.generate", "base_model=tiny", "prompt=the", "max_new_tokens=2")
