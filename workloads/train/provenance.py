"""What a run records in MLflow beside its metrics: versions of code and libraries, and a loss plot."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from workloads.train.metrics_file import histories, read_points
from workloads.train.run_dir import RunDir

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("platform", "workloads")
_LIBRARIES = ("torch", "transformers", "peft", "ray", "mlflow", "numpy", "pyarrow")


def code_version() -> dict[str, str]:
    """MLflow tags: SHA-256 of this project's source, git commit if there is one, versions of libraries."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _SOURCES for path in (_ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
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


def save_loss_plot(run_dir: RunDir) -> None:
    """Plot the losses of a run, and save the plot in its folder."""
    _plot_losses(histories(read_points(run_dir.metrics_file)), run_dir.loss_plot.local)
    run_dir.loss_plot.upload()


def _plot_losses(metrics: Mapping[str, list[tuple[int, float]]], path: Path) -> None:
    """Save the training loss and every validation loss by step as PNG."""
    from matplotlib.figure import Figure

    names = ["loss", *sorted(name for name in sorted(metrics) if name.startswith("validation/loss_"))]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="optimizer step", ylabel="loss (nats per target token)", title=path.parent.name
    )
    for name in names:
        if points := metrics.get(name):
            steps, values = zip(*points, strict=True)
            branches = name.removeprefix("validation/loss_")
            label = (
                "training"
                if name == "loss"
                else f"held out, {branches} {'branch' if branches == '1' else 'branches'}"
            )
            axes.plot(steps, values, label=label, marker="" if name == "loss" else "o", linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
