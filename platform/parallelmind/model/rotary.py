"""Rotary embeddings with the coordinates of pos2d, for every kind of rotary module, recognized by structure.

A module becomes an instance of a generated subclass of its own class (`hf_compat.swap_class`). No RoPE
formula is repeated: angles come from the module itself. Which column of its tables holds which frequency is
probed, since the angle of a column at position 1 is its frequency.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from parallelmind.config import BranchAngle, RopeConfig
from parallelmind.errors import UserError
from parallelmind.model.forward_context import ForwardContext, coordinates, text_length
from parallelmind.model.hf_compat import CheckpointedLayer, restore_class, swap_class, undecorated_forward
from parallelmind.model.rope2d import BRANCH, mix, pair_axes
from parallelmind.model.structure import text_modules

Angles = Tensor | tuple[Tensor, Tensor]  # complex, or (cos, sin)

_FREQUENCIES = "inv_freq"
_TABLE = "embed_positions"
_AXES = "pos2d_axes"

_frequency_lock = Lock()


class Pos2dModule(nn.Module):
    """Mixin for modules that read the coordinates of the running forward pass."""

    pos2d_angle: BranchAngle


class BranchRotary(Pos2dModule):
    """Mixin for a module that turns positions into cos and sin, or complex numbers."""

    _undecorated_forward: Any  # set by swap_class

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Angles:
        """Angles `[batch, seq, columns]`; each column follows the coordinate of its pair.

        Dynamic frequencies depend on the longest position. A branch coordinate is not a length, so only 1D
        positions pass through the length trigger; branch and time use the resulting frequencies. The lock
        keeps another thread from changing them in between.
        """
        layer_type = args[0] if args else kwargs.get("layer_type", "")
        axes = getattr(self, _axes_name(layer_type))
        if torch.compiler.is_compiling():
            flat, branch_and_time = self._angles(x, position_ids, *args, **kwargs)
        else:
            with _frequency_lock:
                flat, branch_and_time = self._angles(x, position_ids, *args, **kwargs)
        if isinstance(flat, Tensor):
            return _mix_table(flat, branch_and_time, axes)
        cos, sin = (_mix_table(*tables, axes) for tables in zip(flat, branch_and_time, strict=True))
        return cos, sin

    @torch.no_grad()
    def _angles(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Angles, Any]:
        """Angles of 1D positions `[batch, seq, columns]`, and of branch and time `[2 * batch, …]`."""
        flat, branch, time = coordinates(position_ids, self.pos2d_angle)
        length = text_length()
        if length is None:
            flat_angles = super().forward(x, flat, *args, **kwargs)
        else:  # one more position, the last one of the text, sets the frequencies
            last = flat.new_full((*flat.shape[:-1], 1), length - 1)
            longer = super().forward(x, torch.cat([flat, last], dim=-1), *args, **kwargs)
            flat_angles = (
                longer[:, :-1] if isinstance(longer, Tensor) else tuple(part[:, :-1] for part in longer)
            )
        return flat_angles, self._undecorated_forward(x, torch.cat([branch, time], dim=-2), *args, **kwargs)


def _mix_table(flat: Tensor, branch_and_time: Tensor, axes: Tensor) -> Tensor:
    branch, time = branch_and_time.chunk(2)
    return mix(flat, branch, time, axes)


class BranchTable(Pos2dModule):
    """Mixin for an attention module that looks positions up in its own table of sines and cosines.

    For each call it gets a table with one row per token, and row numbers as positions.
    """

    pos2d_axes: Tensor

    @property
    def embed_positions(self) -> Tensor:
        """`[rows, columns]`: the table of the running call, or the module's own outside of a call."""
        rows = _CALL_TABLE.get()
        return self._buffers[_TABLE] if rows is None else rows  # type: ignore[return-value]

    def forward(self, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        tokens = coordinates(position_ids, self.pos2d_angle)
        flat, branch, time = (coordinate.flatten() for coordinate in tokens)
        table: Tensor = self._buffers[_TABLE]  # type: ignore[assignment]
        frequencies = table_frequencies(table)
        angles = branch[:, None].to(frequencies) * frequencies  # branch coordinates exceed the table's length
        branch_rows = torch.cat([angles.sin(), angles.cos()], dim=-1).to(table.dtype)
        _CALL_TABLE.set(mix(table[flat], branch_rows, table[time], self.pos2d_axes))
        try:
            row_numbers = torch.arange(len(flat), device=flat.device).view(tokens[0].shape)
            return super().forward(*args, position_ids=row_numbers, **kwargs)
        finally:
            _CALL_TABLE.set(None)


_CALL_TABLE: ForwardContext[Tensor] = ForwardContext("parallelmind_table")


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
    """The layer types for which a module has frequencies; `[""]` where all layers share them."""
    names = (name for name, value in rotary._buffers.items() if isinstance(value, Tensor))
    return [
        name[: -len(_FREQUENCIES)].rstrip("_")
        for name in names
        if name.endswith(_FREQUENCIES) and "original" not in name
    ]


def patch_rotary(model: nn.Module, config: RopeConfig) -> None:
    """Swap the class of every rotary module. Raises UserError, with nothing changed, for an unknown kind."""
    modules = rotary_modules(model)
    axes_buffers = {name: dict(_probe_axes(module, config, model)) for name, module in modules.items()}
    for name, module in modules.items():
        for buffer_name, axes in axes_buffers[name].items():
            module.register_buffer(buffer_name, axes, persistent=False)
        swap_class(module, BranchTable if is_table(module) else BranchRotary)
        module.__dict__["pos2d_angle"] = config.branch_angle
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and any(
            isinstance(module, Pos2dModule) for module in layer.modules()
        ):
            swap_class(layer, CheckpointedLayer)


def unpatch_rotary(model: nn.Module) -> None:
    """Undo `patch_rotary`: classes and buffers are as before."""
    for module in model.modules():
        if restore_class(module):
            for name in [name for name in module._buffers if name.startswith(_AXES)]:
                del module._buffers[name]
            module.__dict__.pop("pos2d_angle", None)


def _axes_name(layer_type: str) -> str:
    return f"{_AXES}_{layer_type}" if layer_type else _AXES


def _probe_axes(rotary: nn.Module, config: RopeConfig, model: Any) -> Iterator[tuple[str, Tensor]]:
    """For each table, the buffer's name and `[columns]`: the coordinate that drives each column."""
    if is_table(rotary):
        frequencies = table_frequencies(rotary._buffers[_TABLE])  # type: ignore[arg-type]
        yield _axes_name(""), _frequency_axes(frequencies, config).repeat(2)
        return
    for layer_type in layer_types(rotary):
        frequencies = _frequencies(rotary, layer_type)
        try:
            nearest, distance = _nearest_frequencies(rotary, layer_type)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise _unsupported_rotary(model.config.model_type, str(error)) from error
        if (distance > 1e-3 * frequencies[nearest]).any():
            raise _unsupported_rotary(
                model.config.model_type, "its angles at position 1 are not its frequencies"
            )
        yield _axes_name(layer_type), _frequency_axes(frequencies, config)[nearest]


def _frequencies(rotary: nn.Module, layer_type: str) -> Tensor:
    frequencies: Tensor = getattr(rotary, f"{layer_type}_{_FREQUENCIES}".lstrip("_"))
    return frequencies.detach().float().flatten()


def _nearest_frequencies(rotary: nn.Module, layer_type: str) -> tuple[Tensor, Tensor]:
    """`[columns]` index of the frequency nearest to the angle at position 1, and the distance to it."""
    angles, frequencies = _column_angles(rotary, layer_type), _frequencies(rotary, layer_type)
    nearest = (angles[:, None] - frequencies[None, :]).abs().min(dim=1)
    return nearest.indices, nearest.values


def _frequency_axes(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """`[frequencies]`: the coordinate that drives each one. Frequencies of 0 are not counted as pairs."""
    turning = frequencies != 0
    axes = torch.zeros(len(frequencies), dtype=torch.long, device=frequencies.device)
    turning_axes = pair_axes(int(turning.sum()), config.rope_2d_ratio, config.pairs, config.branch_angle)
    axes[turning] = torch.from_numpy(turning_axes).to(axes.device)
    return axes


def _column_angles(rotary: nn.Module, layer_type: str) -> Tensor:
    """`[columns]` angles at position 1."""
    angles = _angles_at_one(rotary, layer_type)
    if isinstance(angles, Tensor):
        return angles.angle().flatten()
    cos, sin = angles
    return torch.atan2(sin.float(), cos.float()).flatten()


def _angles_at_one(rotary: nn.Module, layer_type: str) -> Angles:
    """The module's output for position 1, without its length trigger."""
    device = next(rotary.buffers()).device
    kwargs = {"layer_type": layer_type} if layer_type else {}
    x, position_ids = torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, dtype=torch.long, device=device)
    angles: Angles = undecorated_forward(type(rotary))(rotary, x, position_ids, **kwargs)
    return angles


def depends_on_length(model: nn.Module) -> bool:
    """Whether the longest position of a call changes the frequencies of all its tokens."""
    rope_types = (getattr(module, "rope_type", None) for module in rotary_modules(model).values())
    names = {name for kind in rope_types for name in (kind.values() if isinstance(kind, dict) else [kind])}
    return bool(names & {"dynamic", "longrope"})


def time_frequencies(model: nn.Module) -> Iterator[Tensor]:
    """The `[pairs]` float64 angles by which a time step turns the pairs of a head, for each kind of layer.

    Pairs that follow the branch alone do not turn. For a model whose frequencies do not depend on a length.
    """
    for rotary in rotary_modules(model).values():
        for layer_type in layer_types(rotary) or [""]:
            if is_table(rotary):
                angles = table_frequencies(rotary._buffers[_TABLE]).repeat(2)  # type: ignore[arg-type]
            else:
                nearest, _ = _nearest_frequencies(rotary, layer_type)
                angles = _frequencies(rotary, layer_type).double()[nearest]
            axes = getattr(rotary, _axes_name(layer_type), None)
            if axes is not None and rotary.__dict__.get("pos2d_angle") != "added":
                angles = angles.where(axes != BRANCH, 0.0)
            yield _one_of_each_pair(angles).cpu()


def _one_of_each_pair(angles: Tensor) -> Tensor:
    """The angle of each pair from those of columns, which may be given once or twice for each pair."""
    first, second = angles.chunk(2) if len(angles) % 2 == 0 else (angles, angles[:0])
    if torch.equal(first, second):
        return first
    return angles[::2] if torch.equal(angles[::2], angles[1::2]) else angles


def frequency_limit(model: PreTrainedModel) -> int | None:
    """The number of positions above which a text has other frequencies (longrope); None if there is none."""
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    limits = [
        kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def is_complex(rotary: nn.Module) -> bool:
    """Whether the module returns complex numbers. Works on the meta device."""
    angles = _angles_at_one(rotary, layer_types(rotary)[0])
    return isinstance(angles, Tensor) and angles.is_complex()


def table_frequencies(table: Tensor) -> Tensor:
    """`[columns / 2]` float64 frequencies of a table with rows of sines, then cosines."""
    sin, cos = table[1].double().chunk(2)
    return torch.atan2(sin, cos)


def _unsupported_rotary(model_type: str, reason: str) -> UserError:
    remedy = "choose another model, or set patch_rope=false"
    return UserError(
        f"base_model: the rotary embedding of {model_type} is not supported ({reason}); {remedy}"
    )
