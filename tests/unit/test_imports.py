"""Import rules of the project, read from the source without running it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "platform" / "parallelmind"
PRODUCTION = ("parallelmind", "workloads", "serving", "experiments")
PACKAGES = (*PRODUCTION, "benchmarks", "tools")

_FOUNDATION = {
    "errors",
    "config",
    "fork_markers",
    "hardware",
    "layout",
    "outputs",
    "progress",
    "storage",
    "remote",
    "tree",
    "visibility",
}
MAY_IMPORT = {
    "redaction": set(),
    "errors": {"redaction"},
    "outputs": {"errors", "storage"},
    "storage": set(),
    "remote": {"errors", "redaction", "storage"},
    "adapter_location": {"storage"},
    "config": {"adapter_location", "errors", "redaction", "storage"},
    "fork_markers": set(),
    "tree": set(),
    "layout": {"errors", "config", "tree"},
    "visibility": {"config", "tree"},
    "hardware": {"errors", "config"},
    "cluster_nodes": {"errors"},
    "cli": {"errors", "config", "crash_report", "programs", "progress", "redaction"},
    "crash_report": {"errors", "redaction"},
    "programs": {"errors", "config"},
    "progress": set(),
    "ray_env": set(),
    "tracking": {"errors", "config", "ray_env", "redaction", "tracking_database"},
    "wandb_run": {"errors", "ray_env"},
    "tracking_database": {"storage"},
    "model": {*_FOUNDATION, "adapter_location"},
    "data": {*_FOUNDATION, "model"},  # the pipeline's workers load the base model's tokenizer
    "training": {*_FOUNDATION, "model", "data", "tracking"},
    "engine": {*_FOUNDATION, "model", "data"},
    "evaluation": {*_FOUNDATION, "model", "data", "training", "engine", "tracking"},
}
# Planning code, which a process without torch can import.
WITHOUT_TORCH = (
    "parallelmind.config",
    "parallelmind.tree",
    "parallelmind.layout",
    "parallelmind.visibility",
    "parallelmind.engine.sequence_group",
    "parallelmind.engine.block_manager",
    "parallelmind.engine.scheduler",
    "parallelmind.training.outcome",
)
# Checks and models that are made for tests and for docs/models.md.
FIXTURES = {f"parallelmind.evaluation.{name}" for name in ("laws", "probes", "tiny_models")}
MAY_USE_FIXTURES = ("parallelmind.evaluation.", "workloads.evaluate.support", "benchmarks.", "tools.")


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the project but its tests."""
    paths = {}
    for package in PACKAGES:
        folder = LIBRARY if package == "parallelmind" else ROOT / package
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


@cache
def imported_names(module: str) -> frozenset[str]:
    """Every dotted name that a module imports, inside functions and `TYPE_CHECKING` blocks as well."""
    names = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def imported_modules(module: str) -> set[str]:
    """The project's modules that a module imports: `from a import b` is `a.b` if that is one, else `a`."""
    candidates = {name if name in modules() else name.rpartition(".")[0] for name in imported_names(module)}
    return (candidates & modules().keys()) - {module}


def imported_roots(module: str) -> set[str]:
    """Top-level packages that a module imports, such as `torch`."""
    return {name.partition(".")[0] for name in imported_names(module)}


def modules_of(*packages: str) -> list[str]:
    return [name for name in modules() if name.partition(".")[0] in packages]


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: imported_modules(module) for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_imports_inside_the_library_run_one_way() -> None:
    packages = {name.split(".")[1] for name in modules_of("parallelmind") if "." in name}
    assert packages == MAY_IMPORT.keys(), "MAY_IMPORT lists exactly the packages of the library"
    for module in modules_of("parallelmind"):
        if module == "parallelmind":  # it names the whole library
            continue
        package = module.split(".")[1]
        used = {name.split(".")[1] for name in imported_names(module) if name.startswith("parallelmind.")}
        wrong = used - MAY_IMPORT[package] - {package}
        assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("parallelmind", {"parallelmind"}),
        ("workloads", {"parallelmind", "workloads"}),
        ("serving", {"parallelmind", "serving"}),
        ("experiments", {"parallelmind", "workloads", "experiments"}),
    ],
)
def test_imports_between_packages_run_one_way(package: str, allowed: set[str]) -> None:
    assert modules_of(package), f"{package} has no modules"
    for module in modules_of(package):
        wrong = (imported_roots(module) & {*PACKAGES, "tests"}) - allowed
        assert not wrong, f"{module} imports {sorted(wrong)}"


def test_production_does_not_use_test_models_and_laws() -> None:
    assert modules().keys() >= FIXTURES
    for module in modules_of(*PACKAGES):
        if not module.startswith(MAY_USE_FIXTURES):
            used = imported_modules(module) & FIXTURES
            assert not used, f"{module} imports {sorted(used)}"


def test_only_the_pipeline_of_the_library_imports_ray() -> None:
    users = [name for name in modules_of("parallelmind", "experiments") if "ray" in imported_roots(name)]
    assert users == ["parallelmind.data.pipeline"]


def test_only_tracking_imports_mlflow() -> None:
    users = [name for name in modules_of(*PRODUCTION) if "mlflow" in imported_roots(name)]
    assert users == ["parallelmind.tracking"]


def test_only_wandb_run_imports_wandb() -> None:
    users = [name for name in modules_of(*PRODUCTION) if "wandb" in imported_roots(name)]
    assert users == ["parallelmind.wandb_run"]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_planning_code_does_not_reach_torch(module: str) -> None:
    assert module in modules(), f"{module} is gone; name the module that replaces it"
    pending, reached = [module], {module}
    while pending:
        current = pending.pop()
        heavy = imported_roots(current) & {"torch", "transformers", "peft", "ray"}
        assert not heavy, f"{current}, which {module} imports, imports {sorted(heavy)}"
        new = imported_modules(current) - reached
        reached |= new
        pending.extend(new)


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
    """Weights are safetensors and states are JSON: a pickle can run arbitrary code."""
    for module in modules_of(*PRODUCTION):
        assert imported_roots(module).isdisjoint({"pickle", "cloudpickle", "joblib", "dill"}), module
        assert "torch.load(" not in modules()[module].read_text(encoding="utf-8"), module
