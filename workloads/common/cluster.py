"""Start a local Ray cluster, or join a running one."""

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

from parallelmind.data.pipeline import silence_ray_data
from parallelmind.errors import UserError
from parallelmind.hardware import available_cpus, num_gpus

_LOCAL = "local"
_CONNECT_TIMEOUT_S = 5.0
_START_REMEDY = "start it with `ray start --head`, or leave ray_address and $RAY_ADDRESS out"


def connect(address: str | None, forward_output: bool = True) -> None:
    """Join the cluster at `address` or $RAY_ADDRESS; without either, start a local cluster.

    `ray job submit` sets $RAY_ADDRESS. Does nothing if this process is already connected. Never attaches to
    some other cluster that runs on this machine.

    forward_output: print the output of workers in this process.

    Raises UserError if the cluster cannot be used: within seconds if nothing listens at the address, within
    half a minute if the token is wrong.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or _LOCAL
    _check_reachable(address)
    _init_ray(address, forward_output)
    if address == _LOCAL:
        _write_cluster_address(Path(os.environ["RAY_TMPDIR"]))
    else:
        # The coordinator is a detached actor, placed on the node that first asks for it. Ray Data would ask
        # from a worker node, and the autoscaler could then never remove that node.
        get_or_create_autoscaling_coordinator()
    silence_ray_data()
    logging.getLogger("ray.train").setLevel(logging.ERROR)  # its warnings are about retries


def _init_ray(address: str, forward_output: bool) -> None:
    options: dict[str, Any]
    if address == _LOCAL:
        if "RAY_TMPDIR" not in os.environ:
            os.environ["RAY_TMPDIR"] = _make_temp_dir()
        # Ray Train polls the dashboard for its controller's state and logs an error every second without it.
        options = {"include_dashboard": True, "num_cpus": available_cpus(), "num_gpus": num_gpus()}
    else:
        options = {"runtime_env": {"worker_process_setup_hook": _worker_setup(os.getcwd())}}
    try:
        ray.init(
            address,
            logging_level=logging.ERROR,
            logging_config=ray.LoggingConfig(log_level="CRITICAL"),
            log_to_driver=forward_output,
            **options,
        )
    # Ray has no common base class for version mismatch, wrong token and start-up timeout.
    except Exception as error:
        subject = "the local Ray cluster" if address == _LOCAL else f"ray_address={address}:"
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{subject} cannot be used ({reason}); {_remedy(address)}") from error


def _host_and_port(address: str) -> tuple[str, int] | None:
    """Parse HOST:PORT; None for `auto`, `local` and addresses that Ray rejects at once."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    return (match[1], int(match[2])) if match else None


def _check_reachable(address: str) -> None:
    """Raise UserError within seconds if nothing listens at the address; Ray itself retries for minutes."""
    if host_and_port := _host_and_port(address):
        try:
            socket.create_connection(host_and_port, timeout=_CONNECT_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"ray_address={address}: nothing answers there ({error}); {_START_REMEDY}"
            ) from error


def _remedy(address: str) -> str:
    """The remedy for a cluster that listens, or a local one, but cannot be used."""
    if address == _LOCAL:
        return "try again when the machine is less busy, and check its free memory and $RAY_TMPDIR"
    if _host_and_port(address):
        return "use the Ray version, Python version and token (RAY_AUTH_MODE, RAY_AUTH_TOKEN) of the cluster"
    return _START_REMEDY


def _worker_setup(driver_dir: str) -> Callable[[], None]:
    """Setup hook for worker processes of a cluster that was started elsewhere.

    The hook sets $RAY_ADDRESS, so that parts of Ray which search for the current cluster do not pick another
    one on the same machine. It makes gloo use the interface of the node's address: by default gloo resolves
    the host name, which is a loopback address on Debian. It changes to the driver's working directory where
    that exists, so that relative paths mean the same in workers.
    """

    def set_up_worker() -> None:
        os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        if name := _interface_of(ray.util.get_node_ip_address()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if os.path.isdir(driver_dir):
            os.chdir(driver_dir)

    return set_up_worker


def _interface_of(ip: str) -> str | None:
    """The name of the network interface of this machine that has this IP address."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(a.address == ip for a in addresses)), None)


def _make_temp_dir() -> str:
    """Make Ray's temporary folder for this process; it is removed at exit.

    In the default folder, parts of Ray would find the addresses of other clusters.
    """
    folder = tempfile.mkdtemp(prefix="pm-")  # a short name: a socket path is limited to 107 characters
    atexit.register(_shut_down, folder)
    return folder


def _shut_down(temp_dir: str) -> None:
    """Stop Ray, kill those of its processes that deadlock at exit, and remove its temporary folder."""
    ray.shutdown()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == temp_dir:
                process.kill()
    shutil.rmtree(temp_dir, ignore_errors=True)


def _write_cluster_address(temp_dir: Path) -> None:
    """Write the address where `ray start` writes it; parts of Ray read it there."""
    (temp_dir / "ray").mkdir(exist_ok=True)
    (temp_dir / "ray" / "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
