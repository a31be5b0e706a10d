"""The processor: its name, and the instructions that decide what is measured on it."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path


def machine() -> str:
    """Describe the CPU: core count, model, operating system, and whether it has to emulate bfloat16."""
    emulated = "" if has_native_bfloat16() else ", no native bfloat16"
    return f"{os.cpu_count()} × {_model()}, {platform.system()}{emulated}"


def has_native_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are instructions of the processor; otherwise they are emulated."""
    return not flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def has_avx512() -> bool:
    """Whether the processor has the part of AVX-512 that compiled engines require."""
    return flags() >= {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@cache
def flags() -> frozenset[str]:
    """Names of the instruction sets, as Linux gives them; none on other systems."""
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", _cpuinfo(), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def _model() -> str:
    found = re.search(r"^model name\s*: (.*)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or "CPU"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.is_file() else ""
