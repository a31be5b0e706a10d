"""A model split over all workers (FSDP2): each holds a part of every weight and gathers a layer's when it
needs them.
"""

from __future__ import annotations

from torch.distributed.fsdp import fully_shard

from parallelmind.model.hf_compat import block_class_names
from parallelmind.model.structure import causal_lm
from parallelmind.training.loss import TargetLoss


def shard(loss: TargetLoss) -> None:
    """Split in place, a decoder layer at a time and the rest as one. The process group must exist, weights be
    loaded.

    Gradients come out as sums over the workers, like everywhere here, not as means.
    """
    layers = block_class_names(causal_lm(loss.model))
    units = [module for module in loss.model.modules() if type(module).__name__ in layers]
    for unit in (*units, loss):
        sharded = fully_shard(unit)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
