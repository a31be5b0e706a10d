"""Running one check of the doctor in a temporary working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workloads.doctor.check import Check, CheckResult, run_checks
from workloads.doctor.command import CHECKS
from workloads.doctor.config import DoctorConfig


def isolated_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a temporary working directory, and hide clusters and caches of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run_check(check_name: str, **fields: Any) -> CheckResult:
    """The result of one check alone, without those that it needs."""
    (check,) = [check for check in CHECKS if check.name == check_name]
    ((name, result),) = run_checks([Check(check.name, check.run)], DoctorConfig(**fields))
    assert name == check_name
    assert "\n" not in result.line(name)
    return result
