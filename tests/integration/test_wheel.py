"""The wheel is complete: it works without the repository and without an editable install."""

from __future__ import annotations

import ast
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
    assert {name.split("/")[0] for name in names} == {"parallelmind"}, "nothing else at the top level"
    for folder, target in (
        ("platform/parallelmind", ""),
        ("workloads", "parallelmind/"),
        ("serving", "parallelmind/"),
    ):
        root = (ROOT / folder).parent
        files = [
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        assert {target + path.relative_to(root).as_posix() for path in files} <= names


def test_every_import_of_the_wheel_resolves_within_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sources = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in imported:
                root, *rest = module.split(".")
                assert root not in ("workloads", "serving", "experiments"), f"{name}: {module}"
                path = "/".join([root, *rest])
                is_there = f"{path}.py" in sources or f"{path}/__init__.py" in sources
                assert root != "parallelmind" or is_there, f"{name}: {module}"


@pytest.mark.full
def test_commands_run_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    python, folder = clusters.bare_python(tmp_path / "bare"), tmp_path / "elsewhere"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True)
    save_tiny(folder / "tiny")
    (folder / "train.jsonl").write_text('{"input_ids": [5, 6, 7, 8], "answer_offset": 2}\n' * 8)

    def output(*arguments: str | Path) -> str:
        completed = subprocess.run(
            arguments,
            cwd=folder,
            env=clusters.environment(python),
            capture_output=True,
            text=True,
            check=False,
        )
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    where = "import parallelmind, parallelmind.serving.app; print(parallelmind.__file__)"
    assert str(tmp_path / "bare") in output(python, "-c", where)
    command = python.parent / "parallelmind"
    assert "\n  train     " in output(command)
    assert "    parallelmind train EXPERIMENT|CONFIG.yaml" in output(command, "train", "--help")
    run = ["base_model=tiny", "data_path=train.jsonl", "name=run"]
    assert "step 1/1" in output(command, "train", *run)
    assert output(command, "generate", "lora_path=runs/run-*", "prompt=the", "max_new_tokens=2")
    module = [python, "-m", "parallelmind.workloads.generate"]
    assert output(*module, "base_model=tiny", "prompt=the", "max_new_tokens=2")
