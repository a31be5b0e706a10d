"""What this process may compute with: CPUs of its cgroup and cpuset, and GPUs of this machine.

No other module asks torch for a GPU. Importing this module imports no torch, which takes seconds.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from parallelmind.errors import UserError

if TYPE_CHECKING:
    from parallelmind.config import Dtype, DtypeOrAuto

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, AMD, and of Windows' Linux


def available_cpus() -> int:
    """CPUs that this process may use: those of its cpuset, within the quota of its cgroup; at least one.

    `os.cpu_count()` counts the CPUs of the host, also in a container.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cpus, _cgroup_cpus())))


def usable_threads(cpus: float) -> int:
    """Number of compute threads for reserved CPUs: as many, but no more than are available; at least one.

    $OMP_THREAD_LIMIT limits them: torch does not know of it, and oneDNN computes wrong values in bfloat16
    with fewer threads than torch has asked for.
    """
    limit = int(os.environ.get("OMP_THREAD_LIMIT", sys.maxsize))
    return max(1, min(round(cpus), available_cpus(), limit))


def set_threads(cpus: float) -> int:
    """Let torch compute with `usable_threads` in this process; returns the number.

    Replaces $OMP_NUM_THREADS, which Ray sets to 1 in the processes of a cluster.
    """
    import torch

    threads = usable_threads(cpus)
    torch.set_num_threads(threads)
    return threads


def use_available_cpus() -> None:
    """Let torch compute with all available CPUs in a process that has no reservation.

    A user's $OMP_NUM_THREADS stands; that of a job is Ray's own.
    """
    if "OMP_NUM_THREADS" not in os.environ or _IN_JOB in os.environ:
        set_threads(available_cpus())


def num_gpus() -> int:
    """GPUs of this machine that torch can use."""
    if sys.platform == "linux" and not any(map(os.path.exists, _DRIVERS)):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def require_gpu() -> None:
    """Raise UserError if torch cannot use a GPU in this process."""
    if num_gpus() == 0:
        import torch

        raise UserError(
            f"use_gpu=true: torch {torch.__version__} has no GPU on {platform.node()}; "
            "install a torch that is built for its driver, or set use_gpu=false"
        )


def has_native_bfloat16() -> bool:
    """Whether this machine's GPU computes bfloat16 in hardware: NVIDIA's do from Ampere on."""
    import torch

    return num_gpus() > 0 and torch.cuda.is_bf16_supported(including_emulation=False)


def decided_dtype(dtype: DtypeOrAuto) -> Dtype:
    """The name of a compute dtype; for `auto`, the one that suits this machine."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if has_native_bfloat16() else "float32"


def _cgroup_cpus() -> float:
    """CPUs of the smallest quota among this process's cgroup and those above it; infinity without any."""
    return min(map(_quota, _cgroup_dirs()), default=math.inf)


def _cgroup_dirs() -> Iterator[Path]:
    """Folders of the cgroups that limit the CPU time of this process, of version 1 or 2.

    A container without a cgroup namespace sees the path of the host, of which only the root exists.
    """
    if not _MEMBERSHIP.is_file():
        return
    for line in _MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            root = _CGROUPS / "cpu" if controllers else _CGROUPS
            folder = root / path.lstrip("/")
            yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(root))


def _quota(folder: Path) -> float:
    """CPUs that a cgroup grants: quota over period."""
    if (file := folder / "cpu.max").is_file():
        quota, period = file.read_text().split()
    elif (file := folder / "cpu.cfs_quota_us").is_file():
        quota, period = file.read_text().strip(), (folder / "cpu.cfs_period_us").read_text()
    else:
        return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)
