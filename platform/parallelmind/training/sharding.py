"""Fully sharded data parallelism (FSDP2)."""

from __future__ import annotations

from torch.distributed.fsdp import fully_shard

from parallelmind.model.hf_compat import block_class_names
from parallelmind.model.structure import causal_lm
from parallelmind.training.loss import TargetLoss


def shard(loss: TargetLoss) -> None:
    """Shard the model in place, each decoder layer as one unit and the rest as another.

    The weights must be loaded and the process group initialised. Gradients are summed over the workers, as
    everywhere in this package, not averaged.
    """
    layers = block_class_names(causal_lm(loss.model))
    units = [module for module in loss.model.modules() if type(module).__name__ in layers]
    for unit in (*units, loss):
        sharded = fully_shard(unit)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
