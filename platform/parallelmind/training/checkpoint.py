"""One training checkpoint: a folder with weights, optimizer state and `state.json`.

The tensors are safetensors: one file of each kind, or one file of each worker if the model is sharded
(`sharded_checkpoint`). `state.json` holds the SHA-256 of the other files and of itself: a checkpoint is
either complete or ignored.
Training resumes from it bit for bit: checkpoints are taken between steps, when no gradient is held, and the
learning rate and every random generator are functions of the configuration, the step and the worker.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from parallelmind.model.shards import from_shard
from parallelmind.model.weights import check_shapes, trained_weights
from parallelmind.storage import atomic_dir, sha256
from parallelmind.training.sharding import host_mesh
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
    """Weights, optimizer state and training state at one step, copied to the CPU.

    optimizer: by KEY/NAME, with the names of parameters.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: TrainingState

    @property
    def is_sharded(self) -> bool:
        """Whether this is only this worker's part."""
        return any(isinstance(weight, DTensor) for weight in self.weights.values())


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> Snapshot:
    """Copy everything that a checkpoint holds; of what is sharded, this worker's part."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    optimizer_state = {
        f"{key}/{names[parameter]}": _to_host(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    weights = {name: _to_host(value) for name, value in trained_weights(model).items()}
    copy = replace(state, window=replace(state.window), metrics=dict(state.metrics))
    return Snapshot(weights, optimizer_state, copy)


def _to_host(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU; of a sharded tensor, the same shard there."""
    if isinstance(value, DTensor):
        return from_shard(_to_host(value.to_local()), host_mesh(), value)
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Load a complete checkpoint (see `read_state`): the weights into the model, each worker its part.

    Neither the number of workers nor the sharding need be those of the worker that wrote it. Raises UserError
    where names or shapes of weights differ.
    """
    state = read_state(folder)
    assert state is not None, folder
    reader = HuggingFaceStorageReader(str(folder))
    saved = {
        name: item.size
        for name, item in reader.read_metadata().state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    weights = trained_weights(model)
    check_shapes(weights, {name: size for name, size in saved.items() if "/" not in name}, folder)
    parameters, loaded = dict(model.named_parameters()), dict(weights)
    for label, size in saved.items():
        key, _, name = label.partition("/")
        if name:
            weight = parameters[name].detach()
            is_moment = size == weight.shape
            loaded[label] = torch.zeros_like(weight) if is_moment else torch.zeros(size, device=weight.device)
            optimizer.state[parameters[name]][key] = loaded[label]
    with warnings.catch_warnings():  # every worker reads for itself
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(loaded, storage_reader=reader, no_dist=True)
    return state


def write_checkpoint(snapshot: Snapshot, folder: Path) -> None:
    """Write a checkpoint that is not sharded; the folder appears whole."""
    with atomic_dir(folder) as partial:
        save_file(dict(snapshot.weights), partial / _WEIGHTS)
        save_file(dict(snapshot.optimizer), partial / _OPTIMIZER)
        files = {name: sha256(partial / name) for name in (_WEIGHTS, _OPTIMIZER)}
        write_state(snapshot.state, files, partial)


def write_state(state: TrainingState, files: Mapping[str, str], folder: Path) -> None:
    """Write `state.json`. files: SHA-256 by name of the other files."""
    content = {"format": _FORMAT, "files": files, "state": _to_json(state)}
    text = json.dumps({**content, "sha256": _digest(content)}, indent=2)
    (folder / STATE_FILE).write_text(text, encoding="utf-8")


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
