"""A training checkpoint: a folder that is whole or does not count.

Adapter weights (safetensors), optimizer state (tensors only) and `state.json`, which holds the checksum of both. Random
states are not saved: every random choice is drawn from (seed, epoch or step, rank).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from parallelmind.model.adapter import fill, trained_weights
from parallelmind.storage import sha256, whole_folder

_WEIGHTS, _OPTIMIZER, _STATE = "adapter.safetensors", "optimizer.pt", "state.json"
_FORMAT = 1


@dataclass(slots=True)
class State:
    """Where a run stands. epoch, batches: the data's cursor, batches taken in this epoch by all workers together. skipped:
    steps without a finite gradient. branches: trained on so far, by all workers."""

    config_hash: str
    run_id: str | None = None
    step: int = 0
    epoch: int = 0
    batches: int = 0
    skipped: int = 0
    branches: int = 0


def save(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write `folder` under another name beside it, flush it, then rename. Replaces an older one."""
    with whole_folder(folder) as built:
        weights = {name: value.detach().cpu().contiguous() for name, value in trained_weights(model).items()}
        save_file(weights, built / _WEIGHTS)
        torch.save(optimizer.state_dict(), built / _OPTIMIZER)
        files = {name: sha256(built / name) for name in (_WEIGHTS, _OPTIMIZER)}
        (built / _STATE).write_text(json.dumps({"format": _FORMAT, "files": files, **asdict(state)}, indent=2), encoding="utf-8")


def load(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> State:
    """Put a complete checkpoint (see `read_state`) back into model and optimizer."""
    state = read_state(folder)
    assert state is not None, folder
    fill(model, load_file(folder / _WEIGHTS), folder)
    device = next(model.parameters()).device
    optimizer.load_state_dict(torch.load(folder / _OPTIMIZER, map_location=device, weights_only=True))
    return state


def read_state(folder: Path) -> State | None:
    """The state of a complete checkpoint, or None if a file is missing, cut short or changed."""
    try:
        values: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        files = values.pop("files")
        if values.pop("format") != _FORMAT or any(sha256(folder / name) != known for name, known in files.items()):
            return None
        return State(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def newest(parent: Path, config_hash: str) -> Path | None:
    """The complete checkpoint of this configuration with the most steps, among the folders in `parent`."""
    found = []
    for folder in parent.iterdir() if parent.is_dir() else ():
        state = read_state(folder)
        if state is not None and state.config_hash == config_hash:
            found.append((state.step, folder.name, folder))
    return max(found)[2] if found else None
