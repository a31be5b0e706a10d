"""The most memory that a stretch of work holds: on the GPU where the model is there, else of the whole
process.
"""

from __future__ import annotations

import gc
import threading

import psutil
import torch

_CPU = torch.device("cpu")
_PAUSE = 0.002  # seconds between two looks


def memory_in_use(device: torch.device = _CPU) -> int:
    """Bytes that are held now, once rubbish is gone."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident()


class PeakMemory:
    """`with PeakMemory() as peak: work()`, and then `peak.max_bytes` is the most bytes that were held meanwhile."""

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device, self._over = device, threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self.max_bytes = 0

    def __enter__(self) -> PeakMemory:
        self.max_bytes = memory_in_use(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watch.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(_PAUSE):
            self.max_bytes = max(self.max_bytes, _resident())

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.max_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._over.set()
            self._watch.join()


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)
