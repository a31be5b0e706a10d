"""How the coordinates of a running forward pass reach the rotary modules deep inside it.

Eager threads that share a model must not see each other's coordinates, so they travel in context variables. A
compiler cannot trace those, so while it traces they travel in a plain attribute, which it turns into edges of
its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from parallelmind.config import BranchAngle

T = TypeVar("T")


class ForwardContext(Generic[T]):
    """One value per thread and call, none by default, that a compiler can trace too."""

    def __init__(self, name: str) -> None:
        self._context: ContextVar[T | None] = ContextVar(name, default=None)
        self._traced: T | None = None

    def get(self) -> T | None:
        return self._traced if torch.compiler.is_compiling() else self._context.get()

    def set(self, value: T | None) -> None:
        self._traced = value
        if not torch.compiler.is_compiling():
            self._context.set(value)


@dataclass(frozen=True, slots=True)
class Call:
    """The pos2d of one running forward pass (None: a lone branch) and the call that it is nested in."""

    pos2d: Tensor | None
    outer: Call | None


CURRENT: ForwardContext[Call] = ForwardContext("parallelmind_pos2d")


def push(pos2d: Tensor | None, inherit: bool) -> None:
    """Begin a forward pass; `inherit` keeps the coordinates of the pass that it is nested in."""
    outer = CURRENT.get()
    CURRENT.set(Call(outer.pos2d if inherit and outer else pos2d, outer))


def pop() -> None:
    call = CURRENT.get()
    CURRENT.set(call.outer if call else None)


def coordinates(position_ids: Tensor, angle: BranchAngle) -> tuple[Tensor, Tensor, Tensor]:
    """What flat, branch and time pairs of the running forward pass's tokens follow, in the shape of the
    positions.

    angle: whether that is the branch coordinate alone for branch pairs, or added to the time. position_ids:
    `[batch, seq]`, or `[axes, batch, seq]` in a multimodal model, whose axes are all the same for text.

    A call without pos2d is a lone branch at coordinate 0 whose time is its position.
    """
    call = CURRENT.get()
    if call is None or call.pos2d is None:
        return (
            position_ids,
            position_ids if angle == "added" else torch.zeros_like(position_ids),
            position_ids,
        )
    branch, time = call.pos2d.unbind(-1)  # [batch, seq]
    branch = branch + time if angle == "added" else branch
    shape = torch.broadcast_shapes(position_ids.shape, branch.shape)
    return position_ids.expand(shape), branch.expand(shape), time.expand(shape)


def checkpoint_with_context(checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint(run, *args)` such that the recomputation, long after the call, sees the call's own
    coordinates.
    """
    return checkpoint(partial(_resume, CURRENT.get(), run), *args)


def _resume(call: Call | None, run: Callable[..., Any], *args: Any) -> Any:
    now = CURRENT.get()
    CURRENT.set(call)
    try:
        return run(*args)
    finally:
        CURRENT.set(now)
