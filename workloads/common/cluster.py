"""Starting or joining Ray, quietly."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)

from parallelmind.data.pipeline import quiet_data
from parallelmind.errors import UserError

_REACH_S = 5.0
_START = "start it with `ray start --head`, or leave ray_address and $RAY_ADDRESS out"


def connect(address: str | None, forward_output: bool = True) -> None:
    """Join the cluster at `address` or at $RAY_ADDRESS (set under `ray job submit`); without either, start a
    local one.

    Does nothing where this process has joined one before. Never attaches to whatever cluster happens to run
    on this machine. forward_output: print here what workers print. Raises UserError if the cluster is not
    there, or not for this process: within seconds if nothing listens, half a minute if the token is wrong.
    """
    if ray.is_initialized():
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    _refuse_unreachable(where)
    # Ray Train asks the dashboard whether its controller lives, and complains every second where there is
    # none.
    elsewhere = {"runtime_env": {"worker_process_setup_hook": _entering(os.getcwd())}}
    options: dict[str, Any] = {"include_dashboard": True} if where == "local" else elsewhere
    if where == "local" and "RAY_TMPDIR" not in os.environ:
        os.environ["RAY_TMPDIR"] = _scratch()
    try:
        level = ray.LoggingConfig(log_level="ERROR")
        ray.init(
            where, logging_level=logging.ERROR, logging_config=level, log_to_driver=forward_output, **options
        )
    # Ray has no common type for versions that differ, a wrong token and a start that takes too long
    except Exception as error:
        whose = "a cluster of our own" if where == "local" else f"ray_address={where}:"
        raise UserError(
            f"{whose} cannot be used ({' '.join(str(error).split()).rstrip('.')}); {_remedy(where)}"
        ) from error
    if where == "local":
        _name_cluster(Path(os.environ["RAY_TMPDIR"]))
    else:
        # One for the whole cluster and for good, on the node that first asks for it. On a worker, which is
        # where Ray Data would ask, it would keep the autoscaler from ever taking that away.
        get_or_create_autoscaling_coordinator()
    quiet_data()
    logging.getLogger("ray.train").setLevel(logging.ERROR)  # warnings there are about retries


def _host_and_port(where: str) -> tuple[str, int] | None:
    """None for auto, local, or what Ray refuses at once."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", where)
    return (found[1], int(found[2])) if found else None


def _refuse_unreachable(where: str) -> None:
    """Raises UserError in seconds if nothing listens there; Ray itself would try for minutes."""
    if place := _host_and_port(where):
        try:
            socket.create_connection(place, timeout=_REACH_S).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"ray_address={where}: nothing answers there ({error}); {_START}") from error


def _remedy(where: str) -> str:
    """For what cannot be used though something listens there."""
    if where == "local":
        return "try again when the machine is less busy, and look for what holds its memory or $RAY_TMPDIR"
    if _host_and_port(where):
        return (
            "use the Ray, the Python and the token (RAY_AUTH_MODE, RAY_AUTH_TOKEN) that it was started with"
        )
    return _START


def _entering(folder: str) -> Callable[[], None]:
    """For processes of a cluster that was started elsewhere: relative paths mean there what they mean here,
    if they exist.

    Parts of Ray that look for the cluster that they are in find no other one of the machine, and gloo meets
    the other workers at the node's address: by itself it takes what the host's name stands for, which on
    Debian is the machine alone.
    """

    def enter() -> None:
        os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        if name := _interface(ray.util.get_node_ip_address()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if os.path.isdir(folder):
            os.chdir(folder)

    return enter


def _interface(address: str) -> str | None:
    """The network interface of this machine that has an address."""
    found = psutil.net_if_addrs().items()
    return next((name for name, has in found if any(each.address == address for each in has)), None)


def _scratch() -> str:
    """Ray's folder for this process alone. In the common one, parts of Ray would find other clusters'
    addresses.
    """
    folder = tempfile.mkdtemp(prefix="pm-")  # short: socket paths may have 107 characters

    def remove() -> None:
        ray.shutdown()
        for (
            process
        ) in psutil.process_iter():  # some of Ray's lock themselves up as they exit, and would stay for ever
            with suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == folder:
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _name_cluster(folder: Path) -> None:
    """Leave the address where `ray start` would: parts of Ray look there for the cluster that they are in."""
    (folder / "ray").mkdir(exist_ok=True)
    (folder / "ray" / "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)


def total_cpus() -> float:
    return capacity("CPU") or 1.0


def threads_per_process(processes: int) -> int:
    """For each of so many that compute at a time; $OMP_NUM_THREADS decides where it is set. A node may have
    fewer cores.
    """
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, int(total_cpus()) // processes)


def cpus_per_worker(workers: int) -> float:
    """CPUs for each worker: half of all at most, because the readers of Ray Data need some too, or everything
    waits for ever.
    """
    return max(0.01, round(min(0.5, total_cpus() / (2 * workers)), 2))


def cpus_per_elastic_worker(workers: int) -> float:
    """CPUs for each worker where their number follows the nodes: over half of what is its own of a node.

    So another one, of a lost node, does not fit beside it; and the readers still do.
    """
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    parts = {found / part for found in nodes if found for part in range(1, workers + 1)}
    own = max(
        (size for size in parts if sum((found + 1e-6) // size for found in nodes) >= workers), default=1.0
    )
    return max(0.01, round(0.6 * own, 2))


def capacity(resource: str) -> float:
    """How much of a resource the cluster has or, where nodes come when they are asked for, will have.

    The latter is in $PARALLELMIND_GROWS_TO, as `CPU=96,GPU=4`: Ray itself tells nobody what its autoscaler
    may add. Raises UserError if that is no such list.
    """
    given = os.environ.get("PARALLELMIND_GROWS_TO", "")
    try:
        grown = {name: float(count) for name, count in (each.split("=") for each in given.split(",") if each)}
    except ValueError as error:
        raise UserError(
            f"$PARALLELMIND_GROWS_TO={given}: no list of resources; write CPU=96,GPU=4"
        ) from error
    return max(ray.cluster_resources().get(resource, 0.0), grown.get(resource, 0.0))


def max_concurrent_runs(cpus_per_run: int, workers: int, use_gpu: bool, most: int | None) -> int:
    """How many runs fit on the cluster at a time. Raises UserError if none does."""
    found = capacity("CPU")
    fit = int(found // cpus_per_run)
    if fit < 1:
        raise UserError(f"cpus_per_trial={cpus_per_run}: the cluster has {found:g}; lower it, or add nodes")
    if use_gpu:
        require_gpus(workers)
        fit = min(fit, int(capacity("GPU") // workers))
    return min(fit, most or fit)


def require_gpus(count: int) -> None:
    """Raises UserError if the cluster can't have as many GPUs, which would otherwise be waited for for
    ever.
    """
    found = capacity("GPU")
    if found < count:
        raise UserError(
            f"use_gpu=true: num_workers={count} takes as many GPUs, and Ray finds {found:g}; "
            "set use_gpu=false, or see what `python -m workloads.doctor use_gpu=true` says"
        )
