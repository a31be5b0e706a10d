"""Coordinates of a running forward pass, for the rotary modules inside the model.

Threads that share a model must not see each other's coordinates, so they are kept in context variables. A
compiler cannot trace context variables, so while it traces they are kept in a plain attribute, which becomes
an edge of its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from parallelmind.config import BranchAngle

T = TypeVar("T")


class ForwardContext(Generic[T]):
    """One value per thread, None by default, that a compiler can trace."""

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
class ForwardCall:
    """A running forward pass.

    pos2d: None for a single branch. embeddings: `[batch, seq, hidden]` of branches, which are added to those
    of tokens, or None. outer: the call in which it is nested.
    """

    pos2d: Tensor | None
    embeddings: Tensor | None
    outer: ForwardCall | None


CURRENT_CALL: ForwardContext[ForwardCall] = ForwardContext("parallelmind_pos2d")


def push(pos2d: Tensor | None, embeddings: Tensor | None = None) -> None:
    """Begin a forward pass with coordinates of its own."""
    CURRENT_CALL.set(ForwardCall(pos2d, embeddings, CURRENT_CALL.get()))


def push_nested() -> None:
    """Begin a forward pass with the coordinates of the enclosing pass, if there is one."""
    outer = CURRENT_CALL.get()
    CURRENT_CALL.set(replace(outer, outer=outer) if outer else ForwardCall(None, None, None))


def pop() -> None:
    """End the innermost forward pass."""
    call = CURRENT_CALL.get()
    CURRENT_CALL.set(call.outer if call else None)


@contextmanager
def restored() -> Iterator[None]:
    """Context after which no forward pass within it counts as running, not even an interrupted one.

    torch calls no hook that would end it for an exception like KeyboardInterrupt.
    """
    before = CURRENT_CALL.get()
    try:
        yield
    finally:
        CURRENT_CALL.set(before)


@contextmanager
def for_length(length: int | None) -> Iterator[None]:
    """Context in which the tokens belong to a text of this length; None: they are all of it.

    Rotary frequencies that depend on the length of a text follow it, except in a compiled forward pass.
    """
    token = _LENGTH.set(length)
    try:
        yield
    finally:
        _LENGTH.reset(token)


def text_length() -> int | None:
    """The length of the text that the tokens belong to, where `for_length` gives one."""
    return None if torch.compiler.is_compiling() else _LENGTH.get()


_LENGTH: ContextVar[int | None] = ContextVar("parallelmind_length", default=None)


def coordinates(position_ids: Tensor, angle: BranchAngle) -> tuple[Tensor, Tensor, Tensor]:
    """The coordinates that drive flat, branch and time pairs, each in the shape of `position_ids`.

    position_ids: `[batch, seq]`, or `[axes, batch, seq]` in a multimodal model, where all axes are equal for
    text.
    angle: `alone` gives branch pairs the branch coordinate, `added` its sum with the time. A call without
    pos2d is a single branch at coordinate 0 whose time is its position.
    """
    call = CURRENT_CALL.get()
    if call is None or call.pos2d is None:
        branch = position_ids if angle == "added" else torch.zeros_like(position_ids)
        return position_ids, branch, position_ids
    branch, time = call.pos2d.unbind(-1)  # [batch, seq]
    branch = branch + time if angle == "added" else branch
    shape = torch.broadcast_shapes(position_ids.shape, branch.shape)
    return position_ids.expand(shape), branch.expand(shape), time.expand(shape)


def checkpoint_with_context(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint(function, *args)`, whose recomputation sees the coordinates of this call."""
    return checkpoint(partial(_run_in_call, CURRENT_CALL.get(), function), *args)


def _run_in_call(call: ForwardCall | None, function: Callable[..., Any], *args: Any) -> Any:
    previous = CURRENT_CALL.get()
    CURRENT_CALL.set(call)
    try:
        return function(*args)
    finally:
        CURRENT_CALL.set(previous)
