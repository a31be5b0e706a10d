"""Peak memory of a block of code: of the GPU for a model on a GPU, otherwise of the process."""

from __future__ import annotations

import gc
import threading

import psutil
import torch

_CPU = torch.device("cpu")
_SAMPLE_INTERVAL = 0.002  # seconds


def memory_in_use(device: torch.device = _CPU) -> int:
    """Bytes in use after garbage collection: allocated on the GPU, or resident in the process."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident_bytes()


class PeakMemory:
    """Context manager that measures peak memory; `max_bytes` holds the result afterwards.

    On the CPU a thread samples the resident memory of the process.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device, self._stopped = device, threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.max_bytes = 0

    def __enter__(self) -> PeakMemory:
        self.max_bytes = memory_in_use(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.max_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stopped.set()
            self._sampler.join()

    def _sample(self) -> None:
        while not self._stopped.wait(_SAMPLE_INTERVAL):
            self.max_bytes = max(self.max_bytes, _resident_bytes())


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
