"""What `python -m workloads.doctor` looks at on this machine alone: libraries, base model, GPU, memory and
disk.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import tomllib
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import Field

from parallelmind.config import FrozenConfig, TrainConfig
from parallelmind.remote import RemotePath

Status = Literal["ok", "warn", "FAIL", "skip"]

_PROJECT = "parallelmind"
_TOLD = (
    "torch",
    "transformers",
    "peft",
    "ray",
    "mlflow",
)  # the versions that a report of a problem should name
_MEMORY_GIB = 3  # what Ray and one worker with smollm2-135m take, with room to spare
_DISK_GIB = 2
_GIB = 2**30
_FIELDS: dict[str, Any] = TrainConfig.flat_fields()


class DoctorConfig(FrozenConfig):
    """One run of this command, with the fields of a training run."""

    base_model: str = _FIELDS["base_model"]
    output_dir: str = _FIELDS["output_dir"]
    mlflow_uri: str = _FIELDS["mlflow_uri"]
    ray_address: str | None = _FIELDS["ray_address"]
    use_gpu: bool = _FIELDS["use_gpu"]
    end_to_end: bool = Field(
        True, description="train a few steps on generated data, and decode with the adapter"
    )

    @property
    def place(self) -> RemotePath:
        """`output_dir`, as a training run takes it."""
        return RemotePath.at(self.output_dir)

    @property
    def folder(self) -> Path:
        """Of this machine: `output_dir` itself, or its working copy."""
        return self.place.local


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found. remedy: what to do about it."""

    name: str
    status: Status
    said: str
    remedy: str = ""

    def line(self) -> str:
        """One line, whatever was said."""
        told = "; ".join(filter(None, (self.said, self.remedy)))
        return f"{self.status:4}  {self.name:10}  {' '.join(told.split())}"


def libraries(_: DoctorConfig) -> CheckResult:
    """Whether everything that the project asks for is installed."""
    asked = asked_for()
    ours = f"Python {platform.python_version()}"
    if asked is None:
        remedy = "start this in the project's folder"
        return CheckResult(
            "libraries",
            "warn",
            f"{ours}; {_PROJECT} is not installed, and no pyproject.toml here is its own",
            remedy,
        )
    pythons, needed = asked
    if not SpecifierSet(pythons).contains(platform.python_version(), prereleases=True):
        return CheckResult(
            "libraries", "FAIL", f"{ours} is not {pythons}", "run make setup PYTHON=/path/to/another"
        )
    lacking = {str(each): reason for each in needed if (reason := _lacking(each))}
    if lacking:
        remedy = f"run {shlex.join([sys.executable, '-m', 'pip', 'install', *lacking])}"
        return CheckResult("libraries", "FAIL", f"{ours}, but {', '.join(lacking.values())}", remedy)
    told = ", ".join(f"{name} {version(name)}" for name in _TOLD)
    return CheckResult(
        "libraries", "ok", f"{ours}, {told} and {len(needed) - len(_TOLD)} others, as asked for"
    )


def asked_for() -> tuple[str, list[Requirement]] | None:
    """Which Python and which libraries: of the installed project, else of its pyproject.toml in the working
    directory.
    """
    try:
        pythons, lines = metadata(_PROJECT)["Requires-Python"], requires(_PROJECT) or []
    except PackageNotFoundError:
        project: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8")).get("project", {})
        if project.get("name") != _PROJECT:
            return None
        pythons, lines = project["requires-python"], project["dependencies"]
    return pythons, [
        each for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate({"extra": ""})
    ]


def _lacking(asked: Requirement) -> str | None:
    try:
        found = version(asked.name)
    except PackageNotFoundError:
        return f"{asked.name} is missing"
    fits = asked.specifier.contains(found, prereleases=True)
    return None if fits else f"{asked.name} {found} is not {asked.specifier}"


def model(config: DoctorConfig) -> CheckResult:
    """Whether the base model is on this machine, whole. Raises UserError where it is not."""
    from parallelmind.model.model_files import find_local_base, weight_files

    folder = find_local_base(config.base_model)
    size = sum(file.stat().st_size for file in weight_files(folder)) / _GIB
    return CheckResult("model", "ok", f"{config.base_model} is whole: {size:.1f} GiB in {folder}")


def gpu(config: DoctorConfig) -> CheckResult:
    """Which GPUs torch can compute on here. On a cluster, those of its nodes count instead."""
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        build = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "torch has no CUDA"
        )
        said = ". ".join(["none here", *(str(each.message) for each in told), build])
        if config.use_gpu and not joined_address(config):
            return CheckResult(
                "gpu",
                "FAIL",
                f"use_gpu=true: {said}",
                "install torch for CUDA and its driver, or set use_gpu=false",
            )
        return CheckResult("gpu", "ok", said)
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    try:
        for index in range(count):
            torch.ones(8, device=f"cuda:{index}").sum().item()
    except RuntimeError as error:
        remedy = "install a torch that fits the GPU and its driver"
        return CheckResult(
            "gpu",
            "FAIL" if config.use_gpu else "warn",
            f"{', '.join(names)}: cannot compute ({error})",
            remedy,
        )
    return CheckResult("gpu", "ok", ", ".join(names))


def joined_address(config: DoctorConfig) -> str | None:
    """The cluster to join, as `workloads.common.cluster.connect` has it."""
    return config.ray_address or os.environ.get("RAY_ADDRESS")


def memory(_: DoctorConfig) -> CheckResult:
    """Whether Ray and one small worker have room."""
    import psutil

    found = psutil.virtual_memory()
    said = f"{found.available / _GIB:.1f} of {found.total / _GIB:.1f} GiB available"
    if found.available < _MEMORY_GIB * _GIB:
        return CheckResult("memory", "warn", said, f"end other programs: a small run takes {_MEMORY_GIB} GiB")
    return CheckResult("memory", "ok", said)


def disk(config: DoctorConfig) -> CheckResult:
    """Whether checkpoints have room."""
    there = next(path for path in (config.folder, *config.folder.parents) if os.path.exists(path))
    free = shutil.disk_usage(there).free
    said = f"{free / _GIB:.1f} GiB free for output_dir={config.folder}"
    if free < _DISK_GIB * _GIB:
        return CheckResult(
            "disk",
            "warn",
            said,
            f"make room, or choose another: checkpoints take more than {_DISK_GIB} GiB soon",
        )
    return CheckResult("disk", "ok", said)
