"""What a run records in MLflow beside its metrics: versions of code and libraries, and a loss plot."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import parallelmind
from workloads.train.metrics_file import histories, read_points
from workloads.train.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = (Path(parallelmind.__file__).parent, Path(__file__).parents[1])  # the library and workloads
_VALIDATION = "validation/loss_"  # and a number of branches
_LIBRARIES = ("torch", "transformers", "peft", "ray", "mlflow", "numpy", "pyarrow")


def code_version() -> dict[str, str]:
    """MLflow tags: SHA-256 of this project's source, git commit if there is one, versions of libraries."""
    digest = hashlib.sha256()
    for name, path in source_files():
        digest.update(f"{name}\n".encode() + path.read_bytes())
    tags = {
        "code_sha256": digest.hexdigest()[:12],
        **{f"version.{name}": version(name) for name in _LIBRARIES},
    }
    if (_ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(_ROOT), "rev-parse", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if (
            result.returncode == 0
        ):  # fails before the first commit, and if git does not trust the folder's owner
            tags["mlflow.source.git.commit"] = result.stdout.strip()
    return tags


def source_files() -> list[tuple[str, Path]]:
    """The source files of the library and of the workloads, with their names, sorted."""
    return sorted(
        (str(path.relative_to(package.parent)), path)
        for package in _PACKAGES
        for path in package.rglob("*.py")
    )


def save_loss_plot(run_dir: RunDir) -> None:
    """Plot the losses of a run, and save the plot in its folder."""
    _plot_losses(histories(read_points(run_dir.metrics_file)), run_dir.loss_plot.local)
    run_dir.loss_plot.upload()


def _plot_losses(metrics: Mapping[str, list[tuple[int, float]]], path: Path) -> None:
    """Save the training loss and every validation loss by step as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="optimizer step", ylabel="loss (nats per target token)", title=path.parent.name
    )
    if points := metrics.get("loss"):
        axes.plot(*zip(*points, strict=True), label="training", color="grey", linewidth=1)
    counts = sorted(int(name.removeprefix(_VALIDATION)) for name in metrics if name.startswith(_VALIDATION))
    for number, count in enumerate(counts):
        _plot_validation(axes, count, metrics[f"{_VALIDATION}{count}"], f"C{number}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def _plot_validation(axes: Axes, branches: int, points: Sequence[tuple[int, float]], color: str) -> None:
    """Draw one validation loss, with its last value in the legend; a single value is also a level line."""
    steps, values = zip(*points, strict=True)
    label = f"held out, {branches} {'branch' if branches == 1 else 'branches'}: {values[-1]:.3f}"
    axes.plot(steps, values, label=label, color=color, marker="o", linewidth=1)
    if len(values) == 1:
        axes.axhline(values[0], color=color, linewidth=1, linestyle=":")
