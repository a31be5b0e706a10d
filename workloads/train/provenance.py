"""What a run leaves in MLflow beside its metrics: which code and libraries ran, and a picture of its
losses.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from parallelmind.remote import RemotePath

if TYPE_CHECKING:
    from parallelmind.tracking import Tracker

LOSSES = "loss.png"  # in a run's folder
_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("platform", "workloads")
_LIBRARIES = ("torch", "transformers", "peft", "ray", "mlflow", "numpy", "pyarrow")


def code_version() -> dict[str, str]:
    """Tags: the SHA-256 of this project's source, its git commit where there is one, and the versions of its
    libraries.
    """
    digest = hashlib.sha256()
    for path in sorted(path for folder in _SOURCES for path in (_ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    tags = {
        "code_sha256": digest.hexdigest()[:12],
        **{f"version.{name}": version(name) for name in _LIBRARIES},
    }
    if (_ROOT / ".git").exists() and shutil.which("git"):
        asked = subprocess.run(
            ["git", "-C", str(_ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        if (
            asked.returncode == 0
        ):  # not before a first commit, nor where git does not trust the folder's owner
            tags["mlflow.source.git.commit"] = asked.stdout.strip()
    return tags


def keep_losses(place: RemotePath, tracker: Tracker) -> RemotePath:
    """The losses of a run as loss.png, in its folder and in MLflow."""
    picture = place.child(LOSSES)
    _draw_losses(tracker, picture.local)
    picture.upload()
    tracker.log_file(picture.local)
    return picture


def _draw_losses(tracker: Tracker, path: Path) -> None:
    """A PNG of the training loss and of every validation loss, by step."""
    from matplotlib.figure import Figure

    names = ["loss", *sorted(name for name in tracker.metric_names() if name.startswith("validation/loss_"))]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="optimizer step", ylabel="loss (nats per target token)", title=path.parent.name
    )
    for name in names:
        if points := tracker.metric_history(name):
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
