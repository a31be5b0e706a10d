"""Ray Train's set-up of torch in the workers, after a check of their GPUs, and its end."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
from ray.exceptions import OutOfMemoryError
from ray.train.torch import TorchConfig

from parallelmind.hardware import require_gpu

_TorchBackend: Any = TorchConfig().backend_cls


class _CheckedBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: CheckedTorchConfig) -> None:
        """Check every worker first: a process group without its GPU fails with no line for the user."""
        if worker_group.get_resources_per_worker().get("GPU", 0):
            worker_group.execute(require_gpu)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: CheckedTorchConfig) -> None:
        """End the process group. A worker that was killed for lack of memory is no error.

        Ray Train expects errors of lost actors here. After this one it would keep the CPUs of the workers
        reserved, and the next workers would wait for them for ever.
        """
        with suppress(OutOfMemoryError):
            super().on_shutdown(worker_group, backend_config)


class CheckedTorchConfig(TorchConfig):
    """Raises UserError in a worker that has reserved a GPU which torch cannot use.

    Relies on: `backend_cls` of Ray Train, whose `on_start` runs before the process group begins, and
    `on_shutdown` before the workers are released.
    """

    @property
    def backend_cls(self) -> Any:
        return _CheckedBackend
