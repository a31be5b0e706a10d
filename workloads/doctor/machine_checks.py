"""Checks of this machine: base model, GPU, memory and disk."""

from __future__ import annotations

import os
import shutil
import warnings

from parallelmind import hardware
from workloads.doctor.check import CheckResult, Status
from workloads.doctor.config import DoctorConfig

_MEMORY_GIB = 3  # for Ray and one worker with smollm2-135m
_DISK_GIB = 2
_GIB = 2**30


def check_model(config: DoctorConfig) -> CheckResult:
    """Whether this machine has the complete base model. Raises UserError if not."""
    from parallelmind.model.model_files import find_local_base
    from parallelmind.model.weight_check import weight_files

    folder = find_local_base(config.base_model)
    size = sum(file.stat().st_size for file in weight_files(folder)) / _GIB
    return CheckResult("ok", f"{config.base_model}: {size:.1f} GiB in {folder}")


def check_gpu(config: DoctorConfig) -> CheckResult:
    """Whether torch can compute on the GPUs of this machine.

    With use_gpu and a cluster to join, this machine needs no GPU: the ray check looks at its nodes.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpus = hardware.num_gpus()
    if gpus == 0:
        return _no_gpu(config, [str(warning.message) for warning in caught])
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(gpus))
    try:
        for index in range(gpus):
            torch.ones(8, device=f"cuda:{index}").sum().item()
    except RuntimeError as error:
        status: Status = "FAIL" if config.use_gpu is True else "warn"
        remedy = "install a torch that fits the GPU and its driver"
        return CheckResult(status, f"{names}: cannot compute ({error})", remedy)
    return CheckResult("ok", names)


def _no_gpu(config: DoctorConfig, torch_warnings: list[str]) -> CheckResult:
    import torch

    cuda = torch.version.cuda
    build = f"torch {torch.__version__} is built for CUDA {cuda}" if cuda else "torch is built without CUDA"
    message = ". ".join(["no GPU on this machine", *torch_warnings, build])
    if config.use_gpu is True and not config.joined_address:
        remedy = "install torch for CUDA and its driver, or set use_gpu=false"
        return CheckResult("FAIL", f"use_gpu=true: {message}", remedy)
    return CheckResult("ok", message)


def check_memory(_: DoctorConfig) -> CheckResult:
    """Whether there is memory for Ray and one small worker."""
    import psutil

    memory = psutil.virtual_memory()
    message = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"
    if memory.available < _MEMORY_GIB * _GIB:
        return CheckResult("warn", message, f"end other programs: a small run needs {_MEMORY_GIB} GiB")
    return CheckResult("ok", message)


def check_disk(config: DoctorConfig) -> CheckResult:
    """Whether there is disk space for checkpoints."""
    existing = next(path for path in (config.local_dir, *config.local_dir.parents) if os.path.exists(path))
    free = shutil.disk_usage(existing).free
    message = f"{free / _GIB:.1f} GiB free for output_dir={config.local_dir}"
    if free < _DISK_GIB * _GIB:
        remedy = f"free some space, or choose another folder: checkpoints need more than {_DISK_GIB} GiB"
        return CheckResult("warn", message, remedy)
    return CheckResult("ok", message)
