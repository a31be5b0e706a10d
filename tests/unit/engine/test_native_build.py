"""The kernels are built for the processor at hand, and are complete on every one."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from parallelmind.engine import native


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ for x86")
def test_kernels_for_a_processor_without_avx512_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = tuple("-march=x86-64-v3" if flag == "-march=native" else flag for flag in native._FLAGS)
    monkeypatch.setattr(native, "_FLAGS", flags)
    monkeypatch.setattr(native, "cache_dir", lambda: tmp_path)
    # In a process of its own: static data of two libraries with the same names is shared.
    code = "import ctypes, sys, torch; library = ctypes.CDLL(sys.argv[1]); library.attend_float32"
    subprocess.run([sys.executable, "-c", code, str(native._build("g++"))], check=True)
