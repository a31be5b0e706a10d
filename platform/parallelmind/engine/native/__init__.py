"""Kernels in C++ for processors, built for this machine at their first use.

There is no kernel without a compiler: the engine computes with torch alone then.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from pathlib import Path

import torch

from parallelmind.errors import UserNotice, first_line
from parallelmind.storage import cache_dir

_SOURCES = ("attention.cpp", "largest.cpp", "linear.cpp", "lora.cpp", "operators.cpp")
_HEADERS = ("kernels.h", "lanes.h", "numbers.h", "products.h", "vectors.h")
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # Sums in any order. Infinities and NaN keep their meaning.
    *(
        "-fassociative-math",
        "-fno-signed-zeros",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-ffp-contract=fast",
    ),
)
_TORCH = Path(torch.__file__).parent


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The kernels; None, with a notice, where they cannot be built."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        reason = "there is no C++ compiler; install g++"
    else:
        try:
            return ctypes.CDLL(str(_build(compiler)), ctypes.RTLD_GLOBAL)  # compiled code calls the operators
        except subprocess.CalledProcessError as error:
            reason = f"{compiler}: {(error.stderr.strip() or str(error)).splitlines()[0]}"
        except OSError as error:
            reason = f"{compiler}: {first_line(error)}"
    warnings.warn(f"decoding is slower without its C++ kernels ({reason})", UserNotice, stacklevel=2)
    return None


def _build(compiler: str) -> Path:
    """The library in the cache folder, built if it is not there yet."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(f"{compiler} {_FLAGS} {torch.__version__} {_processor()}".encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update((folder / name).read_bytes())
    library = cache_dir() / "native" / f"{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        sources = [str(folder / name) for name in _SOURCES]
        libraries = [f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}", "-ltorch_cpu"]
        command = [compiler, *_FLAGS, *sources, *libraries, "-o", str(partial)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        partial.replace(library)  # several processes may build it at the same time
    return library


def _processor() -> str:
    """What the machine code depends on: the cache folder may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    features = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return features[0] if features else platform.processor() + platform.machine()
