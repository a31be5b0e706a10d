"""Teach a Hugging Face causal LM the two coordinates of pos2d, in place and reversibly.

Every rotary module becomes an instance of a generated subclass of its own class. Its forward runs the original forward
once over the three coordinates stacked (flat, branch, time) and picks, column by column, the angle of the coordinate that
drives that frequency. No RoPE formula is repeated and no model is named. `model(..., pos2d=…)` hands the coordinates
over through a context variable, so threads that share a model never see each other's; without `pos2d` a call is a lone
branch at coordinate 0 whose time is `position_ids`.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from parallelmind.config import Positions, RopeConfig
from parallelmind.errors import UserError
from parallelmind.model.rope2d import pair_axes, pick_columns

_SKIPPED_TOWERS = ("vision", "visual", "audio")


@dataclass(frozen=True, slots=True)
class _Call:
    """The pos2d of one running forward pass (None: a lone branch) and the call that it is nested in."""

    pos2d: Tensor | None
    outer: _Call | None


@dataclass(frozen=True, slots=True)
class _Patch:
    """What a patched model carries: its settings, and the hooks to take away again."""

    config: RopeConfig
    handles: tuple[RemovableHandle, ...]


_current: ContextVar[_Call | None] = ContextVar("parallelmind_pos2d", default=None)


class BranchRotary(nn.Module):
    """Mixed in before a rotary embedding's own class."""

    pos2d_axes: Tensor  # [columns] FLAT, BRANCH or TIME

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """cos and sin, `[batch, seq, columns]`, of every token's own mix of coordinates."""
        coordinates = _coordinates(position_ids)  # [3, batch, seq]
        cos, sin = super().forward(x, coordinates.flatten(0, 1), *args, **kwargs)
        shape = (3, *position_ids.shape, -1)
        return pick_columns(cos.view(shape), self.pos2d_axes), pick_columns(sin.view(shape), self.pos2d_axes)


def _coordinates(position_ids: Tensor) -> Tensor:
    """`[3, batch, seq]`: flat, branch and time coordinate of the tokens in the running forward pass."""
    call = _current.get()
    if call is None or call.pos2d is None:
        return torch.stack([position_ids, torch.zeros_like(position_ids), position_ids])
    branch, time = call.pos2d.unbind(-1)
    return torch.stack([position_ids.expand_as(branch), branch, time])


def patch(model: PreTrainedModel, config: RopeConfig) -> None:
    """Patch in place. Raises UserError if the model is patched already or its rotary embedding is not understood."""
    if is_patched(model):
        raise UserError("model: is patched already; unpatch it first")
    modules = _rotary_modules(model)
    if not modules:
        raise UserError(f"base_model: {model.config.model_type} has no rotary embedding to patch; set patch_rope=false")
    axes = {name: _column_axes(module, config, model.config.model_type) for name, module in modules.items()}
    if config.rope_2d_ratio > 0:
        for name, module in modules.items():
            module.register_buffer("pos2d_axes", axes[name], persistent=False)
            module.__class__ = _branch_class(type(module))  # type: ignore[arg-type]  # mypy takes a class for its instances
    handles = []
    # peft calls the whole model's forward past its hooks, training calls the decoder alone: both take pos2d.
    for entrance in {id(part): part for part in (model, model.base_model)}.values():
        handles.append(entrance.register_forward_pre_hook(partial(_enter, config.positions), with_kwargs=True))
        handles.append(entrance.register_forward_hook(_leave, always_call=True))
    object.__setattr__(model, "_pos2d", _Patch(config, tuple(handles)))


def unpatch(model: PreTrainedModel) -> None:
    """Undo `patch`: classes, buffers and hooks are as they were. Raises UserError if the model is not patched."""
    for handle in _patch_of(model).handles:
        handle.remove()
    for module in model.modules():
        if isinstance(module, BranchRotary):
            del module.pos2d_axes
            module.__class__ = type(module).__mro__[2]
    object.__delattr__(model, "_pos2d")


def is_patched(model: nn.Module) -> bool:
    return getattr(model, "_pos2d", None) is not None


def rope_config(model: nn.Module) -> RopeConfig:
    """The settings that the model (or the model inside a PeftModel) was patched with."""
    return _patch_of(model).config


def _patch_of(model: nn.Module) -> _Patch:
    found = getattr(model, "_pos2d", None)
    if not isinstance(found, _Patch):
        raise UserError("model: is not patched; call patch(model, RopeConfig(...)) or load_model_with_lora first")
    return found


@cache
def _branch_class(rotary: type[nn.Module]) -> type[nn.Module]:
    """A subclass that keeps its parent's name, so that code which looks modules up by name still finds it."""
    return type(rotary.__name__, (BranchRotary, rotary), {"__module__": rotary.__module__, "__qualname__": rotary.__qualname__})


def _rotary_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "inv_freq", None), Tensor) and not any(tower in name for tower in _SKIPPED_TOWERS)
    }


def _column_axes(rotary: Any, config: RopeConfig, model_type: str) -> Tensor:
    """`[columns]` axis of every column of the cos table.

    At position 1 a column's angle is the frequency itself, so one probe tells which frequency each column holds, in
    whatever order the model lays them out.
    """
    frequencies = rotary.inv_freq.detach().float().flatten()
    probe = torch.ones(1, 1, dtype=torch.long, device=frequencies.device)
    try:
        cos, sin = rotary(torch.zeros(1, 1, 1, device=frequencies.device), probe)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        remedy = "choose another model, or set patch_rope=false"
        raise UserError(f"base_model: the rotary embedding of {model_type} is not understood ({error}); {remedy}") from error
    angles = torch.atan2(sin.float(), cos.float()).flatten()
    distance = (angles[:, None] - frequencies[None, :]).abs()
    nearest = distance.min(dim=1)
    if (nearest.values > 1e-4).any():
        raise UserError(f"base_model: the angles of {model_type} are not its frequencies; set patch_rope=false")
    axes = torch.from_numpy(pair_axes(len(frequencies), config.rope_2d_ratio, config.pairs)).to(frequencies.device)
    return axes[nearest.indices]


def _enter(
    positions: Positions, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take pos2d out of the call; what it is nested in keeps its own."""
    outer = _current.get()
    if "pos2d" not in kwargs:
        _current.set(_Call(outer.pos2d if outer else None, outer))
        return args, kwargs
    kwargs = dict(kwargs)
    pos2d = kwargs.pop("pos2d")
    if pos2d is not None:
        if kwargs.get("attention_mask") is None:
            raise ValueError("attention_mask: pos2d needs the mask of its layout; build it with parallelmind.model.mask.visible")
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = _positions(positions, pos2d, kwargs.get("past_key_values"))
    _current.set(_Call(pos2d, outer))
    return args, kwargs


def _positions(positions: Positions, pos2d: Tensor, past: Any) -> Tensor:
    """`[batch, seq]` 1D positions of a call that names only pos2d."""
    if positions == "time":
        return pos2d[..., 1]
    start = past.get_seq_length() if past is not None else 0
    return torch.arange(start, start + pos2d.shape[1], device=pos2d.device).expand(pos2d.shape[:2])


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    call = _current.get()
    _current.set(call.outer if call else None)
