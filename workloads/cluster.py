"""Starting or joining Ray, quietly."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import workloads.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray

from parallelmind.data.pipeline import quiet_data
from parallelmind.errors import UserError, first_line


def connect(address: str | None) -> None:
    """Join the cluster at `address` or at $RAY_ADDRESS (set under `ray job submit`); without either, start a local one.

    Never attaches to whatever cluster happens to run on this machine. Raises UserError if the cluster is not there.
    """
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray Train asks the dashboard whether its controller lives, and complains every second where there is none.
    options: dict[str, Any] = {"include_dashboard": True} if where == "local" else {}
    if where == "local" and "RAY_TMPDIR" not in os.environ:
        os.environ["RAY_TMPDIR"] = _scratch()
    try:
        ray.init(where, logging_level=logging.ERROR, logging_config=ray.LoggingConfig(log_level="ERROR"), **options)
    except (ConnectionError, ValueError) as error:
        remedy = "start it with `ray start --head`, or leave ray_address out"
        raise UserError(f"ray_address={where}: {first_line(error).rstrip('.')}; {remedy}") from error
    if where == "local":
        _name_cluster(Path(os.environ["RAY_TMPDIR"]))
    quiet_data()
    logging.getLogger("ray.train").setLevel(logging.ERROR)  # warnings there are about retries


def _scratch() -> str:
    """Ray's folder for this process alone. In the common one, parts of Ray would find other clusters' addresses."""
    folder = tempfile.mkdtemp(prefix="pm-")  # short: socket paths may have 107 characters

    def remove() -> None:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _name_cluster(folder: Path) -> None:
    """Leave the address where `ray start` would: parts of Ray look there for the cluster that they are in."""
    (folder / "ray").mkdir(exist_ok=True)
    (folder / "ray" / "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)


def cpus() -> float:
    return float(ray.cluster_resources().get("CPU", 1))


def require_gpus(count: int) -> None:
    """Raises UserError if the cluster has fewer GPUs, which would otherwise wait for them for ever."""
    found = ray.cluster_resources().get("GPU", 0)
    if found < count:
        raise UserError(f"use_gpu=true: num_workers={count} needs {count} GPUs and the cluster has {found:g}; set use_gpu=false")
