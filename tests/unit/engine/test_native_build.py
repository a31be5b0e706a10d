"""The kernels are built for the processor at hand, and are complete on every one."""

from __future__ import annotations

import ctypes
import platform
import shutil
from pathlib import Path

import pytest

from parallelmind.engine import native


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ for x86")
def test_kernels_for_a_processor_without_avx512_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = tuple("-march=x86-64-v3" if flag == "-march=native" else flag for flag in native._FLAGS)
    monkeypatch.setattr(native, "_FLAGS", flags)
    monkeypatch.setattr(native, "cache_dir", lambda: tmp_path)
    library = ctypes.CDLL(str(native._build("g++")))
    assert library.attend_float32
    assert library.multiply_float32
