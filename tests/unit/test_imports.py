"""The house: who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "platform" / "parallelmind"
OURS = ("parallelmind", "workloads", "serving", "experiments")

_GROUND = {"errors", "config", "layout", "storage", "remote", "visibility"}
MAY_IMPORT = {
    "errors": set(),
    "storage": set(),
    "remote": {"errors", "storage"},
    "config": {"errors", "storage"},
    "layout": {"errors", "config"},
    "visibility": {"config", "layout"},
    "cli": {"errors", "config"},
    "ray_env": set(),
    "tracking": {"errors", "config"},
    "model": _GROUND,
    "data": {*_GROUND, "model"},  # the pipeline's workers load the base model's tokenizer
    "training": {*_GROUND, "model", "data", "tracking"},
    "engine": {*_GROUND, "model", "data"},
    "evaluation": {*_GROUND, "model", "data", "training", "engine", "tracking"},
}
WITHOUT_TORCH = tuple(
    "config/__init__.py layout.py visibility.py engine/sequence.py engine/scheduler.py training/outcome.py".split()
)


def sources(package: str) -> list[Path]:
    return sorted((LIBRARY if package == "parallelmind" else ROOT / package).rglob("*.py"))


def module_of(path: Path) -> list[str]:
    """The dotted name of a library file, in parts, without `parallelmind`."""
    parts = list(path.relative_to(LIBRARY).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> set[str]:
    """Every absolute dotted name imported anywhere in a file, lazily too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def library_imports(path: Path) -> set[str]:
    """Packages of the library that a library file imports, such as `model`."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("parallelmind.")}


def test_inside_the_library_imports_run_one_way() -> None:
    for path in sources("parallelmind"):
        module = module_of(path)
        if not module:  # parallelmind/__init__.py shows the whole library
            continue
        package = module[0]
        assert package in MAY_IMPORT, f"{path}: a new package; say in MAY_IMPORT what it may import"
        wrong = library_imports(path) - MAY_IMPORT[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("parallelmind", {"parallelmind"}),
        ("workloads", {"parallelmind", "workloads"}),
        ("serving", {"parallelmind", "serving"}),
        ("experiments", {"parallelmind", "workloads", "experiments"}),
    ],
)
def test_between_packages_imports_run_one_way(package: str, allowed: set[str]) -> None:
    for path in sources(package):
        wrong = (roots(path) & set(OURS)) - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_only_the_pipeline_of_the_library_knows_ray() -> None:
    knowing = {
        path.relative_to(LIBRARY).as_posix() for path in sources("parallelmind") if "ray" in roots(path)
    }
    assert knowing <= {"data/pipeline.py"}
    assert not [path for path in sources("experiments") if "ray" in roots(path)]


def test_only_tracking_knows_mlflow() -> None:
    knowing = [path for package in OURS for path in sources(package) if "mlflow" in roots(path)]
    assert [path for path in knowing if path != LIBRARY / "tracking.py"] == []


def test_scheduling_layout_and_config_know_no_torch() -> None:
    files = {".".join(module_of(path)): path for path in sources("parallelmind") if module_of(path)}
    waiting = [LIBRARY / name for name in WITHOUT_TORCH if (LIBRARY / name).exists()]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        assert not roots(path) & {"torch", "transformers", "peft", "ray"}, (
            f"{path.relative_to(ROOT)} reaches torch"
        )
        names = {
            name.removeprefix("parallelmind.") for name in imports(path) if name.startswith("parallelmind.")
        }
        reached = {
            files[part] for name in names for part in (name, name.rpartition(".")[0]) if part in files
        } - seen
        seen |= reached
        waiting.extend(reached)


def test_the_standard_platform_module_is_not_shadowed() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "tests" / "platform").exists()
    script = "import platform, uuid; print(platform.__file__, platform.system(), uuid.uuid4())"
    env = {**os.environ, "PYTHONPATH": "platform"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert not done.stdout.startswith(str(ROOT / "platform"))


def test_nothing_unpickles() -> None:
    """Weights come as safetensors and states as JSON: a pickle would run whatever code its writer put in."""
    for package in OURS:
        for path in sources(package):
            assert roots(path).isdisjoint({"pickle", "cloudpickle", "joblib", "dill"}), path
            assert "torch.load(" not in path.read_text(encoding="utf-8"), path
