"""Decide `auto` in the fields `use_gpu` and `dtype`, and say when a GPU stays unused.

A command decides before anything starts: what a run computes in is part of its identity.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from parallelmind import cluster_nodes, hardware
from parallelmind.config import BoolOrAuto, Dtype, DtypeOrAuto, TrainConfig
from parallelmind.errors import UserError


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs that processes can have. native_bfloat16: whether they compute bfloat16 in hardware."""

    count: float
    native_bfloat16: bool

    @classmethod
    def of_this_machine(cls) -> Gpus:
        count = hardware.num_gpus()
        return cls(count, count > 0 and hardware.has_native_bfloat16())  # without a GPU, no torch is imported

    @classmethod
    def of_cluster(cls, address: str | None, forward_output: bool = True) -> Gpus:
        """GPUs of the cluster that is to be joined, or of this machine.

        The cluster is joined for this. forward_output: as for `cluster.connect`.
        """
        if not (address or os.environ.get("RAY_ADDRESS")):
            return cls.of_this_machine()
        from workloads.common import cluster, resources

        cluster.connect(address, forward_output)
        nodes = resources.nodes()
        return cls(cluster_nodes.total(nodes, "GPU"), cluster_nodes.have_native_bfloat16(nodes))

    def decide(self, use_gpu: BoolOrAuto, dtype: DtypeOrAuto, processes: int = 1) -> tuple[bool, Dtype]:
        """The values of `use_gpu` and `dtype` for processes that have a GPU each.

        Prints a line to stderr if GPUs stay unused. Raises UserError if use_gpu=true and there are too few.
        """
        enough = self.count >= processes
        if use_gpu is True and not enough:
            raise UserError(
                f"use_gpu=true: {self._shortage(processes)}; "
                "set use_gpu=auto, or run `python -m workloads.doctor use_gpu=true`"
            )
        chosen = enough if use_gpu == "auto" else use_gpu
        if self.count and not chosen:
            reason = self._shortage(processes) if use_gpu == "auto" else "use_gpu=false"
            print(f"note: {self.count:g} GPU(s) stay unused: {reason}", file=sys.stderr, flush=True)
        if dtype != "auto":
            return chosen, dtype
        return chosen, "bfloat16" if chosen and self.native_bfloat16 else "float32"

    def _shortage(self, processes: int) -> str:
        if processes == 1:  # also of commands without num_workers
            return "there is no GPU"
        return f"num_workers={processes} needs as many GPUs, and there are {self.count:g}"


def decide_training(config: TrainConfig, forward_output: bool = True) -> TrainConfig:
    """The settings without `auto`. Joins the cluster, if there is one to join.

    forward_output: as for `cluster.connect`.
    """
    gpus = Gpus.of_cluster(config.services.ray_address, forward_output)
    use_gpu, dtype = gpus.decide(config.workers.use_gpu, config.model.dtype, config.workers.num_workers)
    return config.replace(use_gpu=use_gpu, dtype=dtype)
