"""The families of rotary embedding: what a module does decides how it learns the coordinates of pos2d, never
its name.

A module becomes an instance of a generated subclass of its own class, and gives its class back when it is
undone. No RoPE formula is repeated: angles come from the module itself, and which column of its tables holds
which frequency is probed, since at position 1 a column's angle is the frequency.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from parallelmind.config import BranchAngle, RopeConfig
from parallelmind.errors import UserError
from parallelmind.model.forward_context import ForwardContext, checkpoint_with_context, coordinates
from parallelmind.model.rope2d import mix, pair_axes
from parallelmind.model.structure import text_modules

Angles = Tensor | tuple[Tensor, Tensor]  # complex, or cos and sin

_FREQUENCIES = "inv_freq"
_TABLE = "embed_positions"

_SETTLING = Lock()


class Pos2dModule(nn.Module):
    """Mixed in before a module's own class."""

    pos2d_angle: BranchAngle


class BranchRotary(Pos2dModule):
    """A module that turns positions into angles: cos and sin or complex numbers, one table or one per layer
    type.
    """

    _plain_forward: Any  # the class's own forward without its length trigger

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Angles:
        """Angles of every token's own mix of coordinates, `[batch, seq, columns]`.

        Dynamic frequencies depend on the longest position, which a branch coordinate is not: only the 1D
        positions pass through the trigger, and the other coordinates use the frequencies that it has settled
        on, before another thread's text settles them anew.
        """
        layer_type = args[0] if args else kwargs.get("layer_type", "")
        axes = getattr(self, _axes_name(layer_type))
        if torch.compiler.is_compiling():
            one, other = self._angles(x, position_ids, *args, **kwargs)
        else:
            with _SETTLING:
                one, other = self._angles(x, position_ids, *args, **kwargs)
        if isinstance(one, Tensor):
            return _mixed(one, other, axes)
        cos, sin = (_mixed(table, pair, axes) for table, pair in zip(one, other, strict=True))
        return cos, sin

    @torch.no_grad()
    def _angles(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Angles, Any]:
        """Angles of the 1D positions, `[batch, seq, columns]`, and of branch and time coordinates, `[2 *
        batch, …]`.
        """
        flat, branch, time = coordinates(position_ids, self.pos2d_angle)
        one = super().forward(x, flat, *args, **kwargs)
        return one, self._plain_forward(x, torch.cat([branch, time], dim=-2), *args, **kwargs)


def _mixed(flat: Tensor, both: Tensor, axes: Tensor) -> Tensor:
    branch, time = both.chunk(2)
    return mix(flat, branch, time, axes)


class BranchTable(Pos2dModule):
    """An attention that looks its positions up in a table of sines and cosines of its own.

    It is given a table with one row for every token of the call, and the rows' numbers as positions.
    """

    pos2d_axes: Tensor

    @property
    def embed_positions(self) -> Tensor:
        """`[rows, columns]`: the running call's table, or the module's own outside of a call."""
        rows = _ROWS.get()
        return self._buffers[_TABLE] if rows is None else rows  # type: ignore[return-value]

    def forward(self, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        placed = coordinates(position_ids, self.pos2d_angle)
        flat, branch, time = (part.flatten() for part in placed)
        table: Tensor = self._buffers[_TABLE]  # type: ignore[assignment]
        frequencies = table_frequencies(table)
        angles = branch[:, None].to(frequencies) * frequencies  # branches run past the end of the table
        away = torch.cat([angles.sin(), angles.cos()], dim=-1).to(table.dtype)
        _ROWS.set(mix(table[flat], away, table[time], self.pos2d_axes))
        try:
            numbers = torch.arange(len(flat), device=flat.device).view(placed[0].shape)
            return super().forward(*args, position_ids=numbers, **kwargs)
        finally:
            _ROWS.set(None)


class CheckpointedLayer(Pos2dModule):
    """A layer with a rotary module inside: what its checkpoint recomputes must see the coordinates of the
    first time.
    """

    @property
    def _gradient_checkpointing_func(self) -> Any:
        return partial(checkpoint_with_context, self.__dict__["_gradient_checkpointing_func"])

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Any) -> None:
        self.__dict__["_gradient_checkpointing_func"] = function


_ROWS: ForwardContext[Tensor] = ForwardContext("parallelmind_rows")


def rotary_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that turn positions into angles, by name."""
    return {
        name: module
        for name, module in text_modules(model).items()
        if is_table(module) or layer_types(module)
    }


def is_table(module: nn.Module) -> bool:
    """Whether the module looks positions up in a table of sines and cosines."""
    return isinstance(module._buffers.get(_TABLE), Tensor)


def layer_types(rotary: nn.Module) -> list[str]:
    """The layer types that a module has frequencies for; one empty name where it has but one kind."""
    names = (name for name, value in rotary._buffers.items() if isinstance(value, Tensor))
    return [
        name[: -len(_FREQUENCIES)].rstrip("_")
        for name in names
        if name.endswith(_FREQUENCIES) and "original" not in name
    ]


def patch_rotary(model: nn.Module, config: RopeConfig) -> None:
    """Give every rotary module its coordinates. Raises UserError, with nothing changed, for one that is not
    understood.
    """
    modules = rotary_modules(model)
    planned = {name: dict(_probe(module, config, model)) for name, module in modules.items()}
    for name, module in modules.items():
        for buffer, axes in planned[name].items():
            module.register_buffer(buffer, axes, persistent=False)
        swap_class(module, BranchTable if is_table(module) else BranchRotary)
        module.__dict__["pos2d_angle"] = config.branch_angle
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and any(
            isinstance(part, Pos2dModule) for part in layer.modules()
        ):
            swap_class(layer, CheckpointedLayer)


def unpatch_rotary(model: nn.Module) -> None:
    """Undo `patch_rotary`: classes and buffers are as they were."""
    for module in model.modules():
        if isinstance(module, Pos2dModule):
            for name in [name for name in module._buffers if name.startswith("pos2d_axes")]:
                del module._buffers[name]
            module.__dict__.pop("pos2d_angle", None)
            module.__class__ = type(module).__bases__[1]


def swap_class(module: nn.Module, mixin: type[Pos2dModule]) -> None:
    module.__class__ = _branch_class(mixin, type(module))  # type: ignore[arg-type, assignment, unused-ignore]


@cache
def _branch_class(mixin: type[Pos2dModule], own: type[nn.Module]) -> type[nn.Module]:
    """A subclass that keeps its parent's name, so that code which looks modules up by name still finds it."""
    body = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "_plain_forward": inspect.unwrap(own.forward),
    }
    return type(own.__name__, (mixin, own), body)


def _axes_name(layer_type: str) -> str:
    return f"pos2d_axes_{layer_type}" if layer_type else "pos2d_axes"


def _probe(rotary: Any, config: RopeConfig, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Which coordinate drives each column, `[columns]`, for every table of a module."""
    if is_table(rotary):
        table = rotary._buffers[_TABLE]
        yield _axes_name(""), _axes(table_frequencies(table), config).repeat(2)
        return
    for layer_type in layer_types(rotary):
        frequencies = getattr(rotary, f"{layer_type}_{_FREQUENCIES}".lstrip("_")).detach().float().flatten()
        try:
            found = _at_one(rotary, layer_type)
            angles = (
                found.angle()
                if isinstance(found, Tensor)
                else torch.atan2(found[1].float(), found[0].float())
            ).flatten()
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise _not_understood(model.config.model_type, str(error)) from error
        distance = (angles[:, None] - frequencies[None, :]).abs()
        nearest = distance.min(dim=1)
        if (nearest.values > 1e-3 * frequencies[nearest.indices]).any():
            raise _not_understood(model.config.model_type, "its angles at position 1 are not its frequencies")
        yield _axes_name(layer_type), _axes(frequencies, config)[nearest.indices]


def _axes(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """`[pairs]`: the coordinate that drives each frequency. Frequencies of 0 do not turn, and are no
    pairs.
    """
    turning = frequencies != 0
    axes = torch.zeros(len(frequencies), dtype=torch.long, device=frequencies.device)
    chosen = pair_axes(int(turning.sum()), config.rope_2d_ratio, config.pairs, config.branch_angle)
    axes[turning] = torch.from_numpy(chosen).to(axes.device)
    return axes


def _at_one(rotary: Any, layer_type: str) -> Angles:
    """What the module says of position 1, whatever its length trigger would say."""
    device = next(rotary.buffers()).device
    kind = {"layer_type": layer_type} if layer_type else {}
    like, one = torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, dtype=torch.long, device=device)
    found: Angles = inspect.unwrap(type(rotary).forward)(rotary, like, one, **kind)
    return found


def depends_on_length(model: nn.Module) -> bool:
    """Whether the longest position of a call decides about everybody's frequencies in it."""
    kinds = (getattr(module, "rope_type", None) for module in rotary_modules(model).values())
    named = {name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])}
    return bool(named & {"dynamic", "longrope"})


def is_complex(rotary: nn.Module) -> bool:
    """Whether the module speaks in complex numbers; a module on the meta device will do."""
    found = _at_one(rotary, layer_types(rotary)[0])
    return isinstance(found, Tensor) and found.is_complex()


def table_frequencies(table: Tensor) -> Tensor:
    """`[columns / 2]` float64 frequencies of a table whose rows are the sines, then the cosines, of one
    position each.
    """
    sin, cos = table[1].double().chunk(2)
    return torch.atan2(sin, cos)


def _not_understood(model_type: str, why: str) -> UserError:
    remedy = "choose another model, or set patch_rope=false"
    return UserError(f"base_model: the rotary embedding of {model_type} is not understood ({why}); {remedy}")
