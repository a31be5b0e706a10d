"""Copies between the host and an accelerator for which neither waits for the other."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """A tensor or an array of the host, on a device."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if device.type == "cuda":  # a copy of pageable memory would wait for the device
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host. What the device is given to compute after it does not delay it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._arrived = tensor, None
        if tensor.device.type == "cuda":
            cuda: Any = torch.cuda
            self._tensor, self._arrived = tensor.to("cpu", non_blocking=True), cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """The values, as soon as they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[Any] = self._tensor.tolist()
        return values
