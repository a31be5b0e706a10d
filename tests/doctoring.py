"""One check of the doctor at a time, in a working directory of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workloads.doctor import command as doctor
from workloads.doctor.command import CHECKS, Check
from workloads.doctor.local_checks import CheckResult, DoctorConfig


def place_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of our own, and no cluster or cache of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def found(name: str, **fields: Any) -> CheckResult:
    """What the check of that name finds."""
    (check,) = [each for each in CHECKS if each.name == name]
    (finding,) = doctor.findings([Check(name, check.find)], DoctorConfig(**fields))
    assert "\n" not in finding.line()
    return finding
