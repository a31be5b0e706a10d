"""Batches of `pm.tree_batch` as arguments of a patched model.

A mask depends on the model: on its attention and on the windows of its layers. So a batch holds what the mask
is made from, and the model makes it when it is called.
"""

from __future__ import annotations

from typing import Any, NoReturn, Self

from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.errors import UserError, format_value
from parallelmind.model.mask import Placement, attention_masks
from parallelmind.model.patch_state import rope_config

LAYOUT = ("pos2d", "segment", "relations")  # arguments that only a patched model takes
_UNPATCHED = "model: is not patched, so it cannot use the pos2d of this batch; call pm.patch(model, config)"


class UnpatchedModelError(UserError, AttributeError):
    """A model that is not patched was called with a batch of trees.

    It is an AttributeError, so that a batch can be copied and pickled, which look for optional attributes.
    """


class BatchSettings:
    """The settings of a batch, which the batch holds as `past_key_values`.

    Models ignore unknown arguments, but they use `past_key_values`. So a model that is not patched raises the
    error of this object, instead of reading the batch as plain sequences. A patched model compares the
    settings with its own and takes the object out of the call. The cost is that a batch cannot follow a
    cache, and that one of its values is no tensor.
    """

    def __init__(self, config: RopeConfig) -> None:
        self.config = config

    def to(self, *_: Any, **__: Any) -> Self:
        """Nothing to move; for loops that move every value of a batch to a device."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise UnpatchedModelError(_UNPATCHED)

    def __len__(self) -> int:
        raise UnpatchedModelError(_UNPATCHED)

    def __getitem__(self, index: Any) -> Self:
        """Itself for a slice, for loops that take some rows of every value of a batch."""
        if isinstance(index, slice):
            return self
        raise UnpatchedModelError(_UNPATCHED)


def replace_layout(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Replace `segment` and `relations` among the arguments of a call by the mask that they define.

    Raises UserError for other settings than those of the model, for a part of a batch, and for a mask beside
    it.
    """
    config = rope_config(model)
    if isinstance(settings := kwargs.get("past_key_values"), BatchSettings):
        _check_same(settings.config, config)
        kwargs["past_key_values"] = None
    if "segment" not in kwargs and "relations" not in kwargs:
        return
    for name in LAYOUT:
        if kwargs.get(name) is None:
            raise UserError(f"{name}: is missing; pass everything that tree_batch returns")
    if kwargs.get("attention_mask") is not None:
        raise UserError("attention_mask: the model makes it from segment and relations; leave it out")
    rows = {name: len(kwargs[name]) for name in LAYOUT}
    if len(set(rows.values())) > 1:
        counts = " ".join(f"{name}={count}" for name, count in rows.items())
        raise UserError(f"rows: {counts}: differ; take the same rows of every value of the batch")
    placement = Placement(kwargs["pos2d"][..., 1], kwargs.pop("segment"), kwargs.pop("relations"))
    kwargs["attention_mask"] = attention_masks(model, placement, config.visibility)
    if kwargs.get("use_cache") is None:  # nothing is decoded after the batch
        kwargs["use_cache"] = False


def _check_same(given: RopeConfig, own: RopeConfig) -> None:
    for name, value in own.model_dump().items():
        if (other := getattr(given, name)) != value:
            raise UserError(
                f"config: the batch has {name}={format_value(other)}, the model {format_value(value)}; "
                "make the batch with pm.rope_config(model)"
            )
