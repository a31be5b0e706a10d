"""A training checkpoint: a folder that is whole or does not count.

Weights and optimizer state (safetensors, named after the parameters) and `state.json`, which holds the
SHA-256 of both and of itself. Nothing else is needed to go on bit for bit: checkpoints are taken between
steps, where no gradient is held, and the learning rate and every random generator are functions of the
configuration, the step and the worker.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from parallelmind.errors import UserError, first_line
from parallelmind.model.weights import trained_weights
from parallelmind.remote import RemotePath
from parallelmind.storage import atomic_dir, process_lock, remove_partial_dirs, sha256
from parallelmind.training.step import Totals

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_PREFIX = "step-"
_FORMAT = 2


@dataclass(slots=True)
class State:
    """Where a run stands.

    epoch, batches: the data's cursor, batches taken in this epoch by all workers together. per_epoch: batches
    of an epoch, as planned, and as counted once one has ended. skipped: steps without a finite gradient, bad:
    the last so many in a row. branches: trained on so far, by all workers. scale: of the loss, and clean:
    finite steps since it last changed (float16 only). best: lowest validation loss, seen at best_step.
    window: sums since the last log line. metrics: the last ones.
    """

    config_hash: str
    run_id: str | None = None
    step: int = 0
    epoch: int = 0
    batches: int = 0
    per_epoch: int = 0
    skipped: int = 0
    bad: int = 0
    branches: int = 0
    scale: float = 1.0
    clean: int = 0
    best: float | None = None
    best_step: int | None = None
    window: Totals = field(default_factory=Totals)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything of one moment, on the CPU, untouched by later steps."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: State


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> Snapshot:
    """A copy of the moment. Where the model is sharded every worker must call it, and each gets the whole of
    it.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{key}/{names[parameter]}": to_full_cpu(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    return Snapshot(
        whole_weights(model),
        moments,
        replace(state, window=replace(state.window), metrics=dict(state.metrics)),
    )


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained, by name. Where the model is sharded every worker must call it."""
    return {name: to_full_cpu(value) for name, value in trained_weights(model).items()}


def to_full_cpu(value: Tensor) -> Tensor:
    """A copy on the CPU, of all shards if it is sharded."""
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """Put a snapshot's optimizer state back, sharded as the parameters are now."""
    parameters = dict(model.named_parameters())
    for label, value in saved.items():
        key, _, name = label.partition("/")
        parameter = parameters[name]
        if value.shape == parameter.shape:
            value = value.to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        optimizer.state[parameter][key] = value


def read(folder: Path) -> Snapshot:
    """A complete checkpoint (see `read_state`)."""
    state = read_state(folder)
    assert state is not None, folder
    return Snapshot(load_file(folder / _WEIGHTS), load_file(folder / _OPTIMIZER), state)


def read_state(folder: Path) -> State | None:
    """The state of a complete checkpoint, or None if a file is missing, cut short or changed."""
    try:
        note: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if note.pop("sha256") != _digest(note) or note["format"] != _FORMAT:
            return None
        if any(sha256(folder / name) != known for name, known in note["files"].items()):
            return None
        return State(**{**note["state"], "window": Totals(**note["state"]["window"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(note: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def newest(parent: Path, config_hash: str) -> Path | None:
    """The complete checkpoint of this configuration with the most steps, among the folders in `parent`."""
    return next((folder for folder in reversed(by_step(parent)) if _counts(folder, config_hash)), None)


def _counts(folder: Path, config_hash: str) -> bool:
    state = read_state(folder)
    return state is not None and state.config_hash == config_hash


def by_step(parent: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    return [parent / name for name in written(RemotePath(parent))]


def written(parent: RemotePath) -> list[str]:
    """Names of the checkpoint folders, oldest first, whole or not."""
    return sorted((name for name in parent.list_names() if _number(name) >= 0), key=_number)


def _number(name: str) -> int:
    """The step in the name of a checkpoint folder, -1 for what is none."""
    number = name.removeprefix(_PREFIX)
    return int(number) if name != number and number.isdecimal() else -1


def download(checkpoint: RemotePath) -> Path:
    """The folder of a checkpoint on this machine, copied here unless it is here, whole and the one that is at
    the URI.
    """
    if checkpoint.uri is not None:
        with process_lock(checkpoint.local.parent / ".bringing"):  # one worker of a machine brings it for all
            here = (
                RemotePath(checkpoint.local / _STATE).read_bytes() if read_state(checkpoint.local) else None
            )
            if here is None or here != checkpoint.child(_STATE).read_bytes():
                checkpoint.download(last=_STATE)
    return checkpoint.local


class CheckpointManager:
    """The checkpoints of a run, written in the background by the one worker that holds the folder's lock.

    keep: how many of the newest stay; the best stays as well. What counts is what lies at the place's URI, if
    it has one.
    """

    def __init__(self, place: RemotePath, keep: int) -> None:
        self.place, self.folder, self._keep = place, place.local, keep
        folder = self.folder
        self._lock = process_lock(folder / ".writer")
        self._lock.acquire()  # waits until a writer that was given up for lost is gone
        remove_partial_dirs(folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def resume(self, config_hash: str, say: Callable[[str], None]) -> Path | None:
        """The newest complete checkpoint. Newer ones that are not are told and put aside under another
        name.
        """
        self._bring_newest(config_hash)
        found = newest(self.folder, config_hash)
        for folder in by_step(self.folder):
            if found is None or _number(folder.name) > _number(found.name):
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                self.place.child(folder.name).delete_remote()
                say(f"{folder} is damaged or of other settings; put aside as {aside.name}")
        return found

    def _bring_newest(self, config_hash: str) -> None:
        """Copy the newest complete checkpoint here, and the damaged ones after it; what lies here alone was
        never finished.
        """
        if self.place.uri is None:
            return
        there = written(self.place)
        for folder in by_step(self.folder):
            if folder.name not in there:
                shutil.rmtree(folder)
        for name in reversed(there):
            if _counts(download(self.place.child(name)), config_hash):
                return

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write; first waits for the save before. Raises UserError if that one failed."""
        self.wait()
        self._pending = self._thread.submit(self._write, snapshot)

    def wait(self) -> None:
        """Until the last save is on the disk. Raises UserError, naming what is still good, if it failed."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except (OSError, SafetensorError) as error:
            kept = ", ".join(folder.name for folder in by_step(self.folder)) or "none"
            raise UserError(
                f"{self.place.field}: a checkpoint cannot be written in {self.place} ({first_line(error)}; whole ones: {kept}); "
                "make room there, and the same command goes on"
            ) from error

    def close(self) -> None:
        """Wait as above, and let the next writer in."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._lock.release()

    def _write(self, snapshot: Snapshot) -> None:
        with atomic_dir(self.folder / f"{_PREFIX}{snapshot.state.step}") as built:
            save_file(dict(snapshot.weights), built / _WEIGHTS)
            save_file(dict(snapshot.optimizer), built / _OPTIMIZER)
            files = {name: sha256(built / name) for name in (_WEIGHTS, _OPTIMIZER)}
            note = {"format": _FORMAT, "files": files, "state": asdict(snapshot.state)}
            (built / _STATE).write_text(
                json.dumps({**note, "sha256": _digest(note)}, indent=2), encoding="utf-8"
            )
        self.place.child(f"{_PREFIX}{snapshot.state.step}").upload(last=_STATE)
        best = f"{_PREFIX}{snapshot.state.best_step}"
        for name in written(self.place)[: -self._keep]:
            if name != best:
                shutil.rmtree(self.folder / name, ignore_errors=self.place.uri is not None)
                self.place.child(name).delete_remote()
