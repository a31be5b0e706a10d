"""What a process finds of CPUs and GPUs: cgroups of both versions, cpusets, and a patched torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parallelmind import hardware
from parallelmind.errors import UserError


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of /sys/fs/cgroup, on a machine of 16 CPUs."""
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    return tmp_path


def write(folder: Path, membership: str, files: dict[str, str]) -> None:
    (folder / "membership").write_text(membership)
    for name, content in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # half a CPU
        ("0::/pod/job\n", {"pod/cpu.max": "400000 100000\n", "pod/job/cpu.max": "max 100000\n"}, 4),
        (
            "4:cpu,cpuacct:/pod\n1:memory:/else\n",
            {"cpu/pod/cpu.cfs_quota_us": "250000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        # A container without a namespace of its own names a cgroup of the host, and sees its own as the root.
        ("3:cpu:/host/path\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("", {}, 16),
    ],
)
def test_cpus_are_those_of_the_cgroup(
    cgroups: Path, membership: str, files: dict[str, str], expected: int
) -> None:
    write(cgroups, membership, files)
    assert hardware.available_cpus() == expected


def test_cpus_are_those_of_the_cpuset(monkeypatch: pytest.MonkeyPatch, cgroups: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert hardware.available_cpus() == 2


def test_threads_stay_within_the_limit_of_openmp(monkeypatch: pytest.MonkeyPatch, cgroups: Path) -> None:
    """torch would ask for more, and products in bfloat16 would be wrong."""
    monkeypatch.setenv("OMP_THREAD_LIMIT", "2")
    assert hardware.usable_threads(8) == 2


@pytest.mark.usefixtures("threads", "cgroups")
@pytest.mark.parametrize(("reserved", "expected"), [(8, 8), (7.9, 8), (0.9, 1), (0.1, 1), (64, 16)])
def test_threads_are_those_of_the_reservation(
    monkeypatch: pytest.MonkeyPatch, reserved: float, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # by `ray start`
    monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
    assert hardware.set_threads(reserved) == torch.get_num_threads() == expected


@pytest.mark.usefixtures("threads", "cgroups")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 16),
        ({"OMP_NUM_THREADS": "3"}, 3),  # a user's own
        ({"OMP_NUM_THREADS": "1", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, 16),
    ],
)
def test_a_process_without_a_reservation_computes_with_all_cpus(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: int
) -> None:
    torch.set_num_threads(3)
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hardware.use_available_cpus()
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("major", "dtype"), [(7, "float32"), (8, "bfloat16"), (9, "bfloat16")])
def test_a_gpu_computes_bfloat16_if_it_has_the_hardware(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, major: int, dtype: str
) -> None:
    class Properties:
        def __init__(self, _: object) -> None:
            self.major = major

    monkeypatch.setattr(hardware, "_DRIVERS", (str(tmp_path),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    assert hardware.num_gpus() == 2
    assert hardware.decided_dtype("auto") == dtype
    assert hardware.decided_dtype("float16") == "float16"


def test_without_a_gpu_auto_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "num_gpus", lambda: 0)
    assert hardware.decided_dtype("auto") == "float32"
    with pytest.raises(UserError, match=r"^use_gpu=true: torch .* has no GPU on .*; install a torch"):
        hardware.require_gpu()
