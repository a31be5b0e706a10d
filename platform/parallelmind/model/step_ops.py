"""Operators of a decoding step whose state the engine holds: packed weights, adapters and the KV cache.

A compiler calls them as they are. Weights, adapters, cache blocks and what a token attends to may therefore
change from step to step without compiling again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from parallelmind.model.forward_context import ForwardContext


class RunningStep(Protocol):
    """What a forward pass of the engine computes with.

    attends: whether `attend` computes the attention of the model's layers.
    """

    attends: bool

    def linear(self, input: Tensor, group: int) -> Tensor:
        """`[..., outputs]` of `[..., inputs]`: the product with the weights of a `LinearGroup`."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        layer: int,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Cache keys and values of the step's tokens; attend to what each token sees.

        query, key, value: `[1, heads, tokens, dim]`. mask: what `step_mask` returned for the layer.
        softcap, sinks: as in `hf_compat.AttentionBackend.attend`. Returns `[1, tokens, heads, dim]`.
        """


_RUNNING: ForwardContext[RunningStep] = ForwardContext("parallelmind_step")


@contextmanager
def running(step: RunningStep) -> Iterator[None]:
    """Context in which the operators compute with `step`."""
    _RUNNING.set(step)
    try:
        yield
    finally:
        _RUNNING.set(None)


def is_running() -> bool:
    """Whether the running forward pass is a step of the engine."""
    return _RUNNING.get() is not None


def is_attending() -> bool:
    """Whether `attend` computes attention in the running forward pass."""
    step = _RUNNING.get()
    return step is not None and step.attends


def step_mask(window: int) -> Tensor:
    """A tensor that a model takes as a mask and hands to its layers: the number of an attention window.

    On the host, because every layer reads it.
    """
    return torch.full((1, 1, 1, 1), float(window))


def running_step() -> RunningStep:
    """The step that runs."""
    step = _RUNNING.get()
    assert step is not None, "the operators are called within a step"
    return step


def _linear(input: Tensor, group: int, outputs: int) -> Tensor:
    return running_step().linear(input, group)


def _linear_shape(input: Tensor, group: int, outputs: int) -> Tensor:
    return input.new_empty((*input.shape[:-1], outputs))


def _attend(*args: Any) -> Tensor:
    return running_step().attend(*args)


def _attend_shape(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


_LIBRARY = torch.library.Library("parallelmind", "DEF")
_LIBRARY.define("step_linear(Tensor input, int group, int outputs) -> Tensor")
_LIBRARY.define(
    "step_attend(Tensor query, Tensor key, Tensor value, Tensor mask, int layer, float scale, "
    "float? softcap, Tensor? sinks) -> Tensor"
)
for _name, _function, _shape in (
    ("step_linear", _linear, _linear_shape),
    ("step_attend", _attend, _attend_shape),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"parallelmind::{_name}", _shape, lib=_LIBRARY)

linear = torch.ops.parallelmind.step_linear
attend = torch.ops.parallelmind.step_attend
