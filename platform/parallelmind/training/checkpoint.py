"""One training checkpoint: a folder with weights, optimizer state and `state.json`.

`state.json` holds the SHA-256 of the other files and of itself: a checkpoint is either complete or ignored.
Training resumes from it bit for bit: checkpoints are taken between steps, when no gradient is held, and the
learning rate and every random generator are functions of the configuration, the step and the worker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from parallelmind.model.weights import trained_weights
from parallelmind.storage import atomic_dir, sha256
from parallelmind.training.step import Totals

STATE_FILE = "state.json"
_WEIGHTS, _OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
_FORMAT = 2
# Keys of state.json that differ from the names of the fields. They are part of the format.
_STATE_KEYS = {
    "batches_per_epoch": "per_epoch",
    "skipped_steps": "skipped",
    "bad_steps": "bad",
    "loss_scale": "scale",
    "clean_steps": "clean",
    "best_loss": "best",
    "padded_tokens": "places",
}
_STATE_FIELDS = {key: name for name, key in _STATE_KEYS.items()}


@dataclass(slots=True)
class TrainingState:
    """Position and counters of a run.

    epoch, batches: position in the data; batches of this epoch that all workers together have taken.
    batches_per_epoch: estimated, and exact once an epoch has ended. skipped_steps: steps without a finite
    gradient. bad_steps: consecutive ones up to now. branches: trained on by all workers. loss_scale, and
    clean_steps since it last changed: float16 only. best_loss: lowest mean validation loss, at best_step.
    window: sums since the last progress line. metrics: the latest ones.
    """

    config_hash: str
    run_id: str | None = None
    step: int = 0
    epoch: int = 0
    batches: int = 0
    batches_per_epoch: int = 0
    skipped_steps: int = 0
    bad_steps: int = 0
    branches: int = 0
    loss_scale: float = 1.0
    clean_steps: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    window: Totals = field(default_factory=Totals)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Weights, optimizer state and training state at one step, copied to the CPU."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: TrainingState


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> Snapshot:
    """Copy everything that a checkpoint holds. A collective operation where the model is sharded."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    optimizer_state = {
        f"{key}/{names[parameter]}": to_full_cpu(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    copy = replace(state, window=replace(state.window), metrics=dict(state.metrics))
    return Snapshot(full_weights(model), optimizer_state, copy)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained weights by name. A collective operation where the model is sharded."""
    return {name: to_full_cpu(value) for name, value in trained_weights(model).items()}


def to_full_cpu(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU; a sharded tensor is gathered."""
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """Load the optimizer state of a snapshot, sharded as the parameters are now."""
    parameters = dict(model.named_parameters())
    for label, value in saved.items():
        key, _, name = label.partition("/")
        parameter = parameters[name]
        if value.shape == parameter.shape:
            value = value.to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        optimizer.state[parameter][key] = value


def write_checkpoint(snapshot: Snapshot, folder: Path) -> None:
    """Write a checkpoint; the folder appears whole."""
    with atomic_dir(folder) as partial:
        save_file(dict(snapshot.weights), partial / _WEIGHTS)
        save_file(dict(snapshot.optimizer), partial / _OPTIMIZER)
        files = {name: sha256(partial / name) for name in (_WEIGHTS, _OPTIMIZER)}
        content = {"format": _FORMAT, "files": files, "state": _to_json(snapshot.state)}
        text = json.dumps({**content, "sha256": _digest(content)}, indent=2)
        (partial / STATE_FILE).write_text(text, encoding="utf-8")


def read_checkpoint(folder: Path) -> Snapshot:
    """Read a complete checkpoint (see `read_state`)."""
    state = read_state(folder)
    assert state is not None, folder
    return Snapshot(load_file(folder / _WEIGHTS), load_file(folder / _OPTIMIZER), state)


def read_state(folder: Path) -> TrainingState | None:
    """The state of a complete checkpoint; None if a file is missing, truncated or changed."""
    try:
        content: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if content.pop("sha256") != _digest(content) or content["format"] != _FORMAT:
            return None
        if any(sha256(folder / name) != digest for name, digest in content["files"].items()):
            return None
        values = _from_json(content["state"])
        return TrainingState(**{**values, "window": Totals(**_from_json(values["window"]))})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _to_json(values: TrainingState | Totals) -> dict[str, Any]:
    content = {}
    for item in fields(values):
        value = getattr(values, item.name)
        content[_STATE_KEYS.get(item.name, item.name)] = (
            _to_json(value) if isinstance(value, Totals) else value
        )
    return content


def _from_json(content: Mapping[str, Any]) -> dict[str, Any]:
    return {_STATE_FIELDS.get(key, key): value for key, value in content.items()}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
