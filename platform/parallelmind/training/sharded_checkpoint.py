"""Checkpoints of a sharded model: every worker writes its part, and none gathers another's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from parallelmind.errors import UserError
from parallelmind.model.shards import to_full
from parallelmind.model.weights import trained_weights
from parallelmind.remote import RemotePath
from parallelmind.storage import atomic_dir, sha256
from parallelmind.training.checkpoint import STATE_FILE, Snapshot, write_state
from parallelmind.training.sharding import host_mesh

_T = TypeVar("_T")


def write_shards(snapshot: Snapshot, folder: RemotePath) -> None:
    """Write a checkpoint together with all other workers; the folder appears whole.

    Without a URI, all workers see the folder. Nothing else may use `host_mesh` at the same time. Raises on
    every worker the OSError or UserError of one that cannot write.
    """
    rank = dist.get_rank()
    with ExitStack() as stack:
        folders = _exchange(lambda: _enter_folder(stack, folder, rank))
        partial = Path(folders[rank] or folders[0])
        _save(snapshot, partial)
        hashes = _exchange(lambda: _publish(partial, folder, rank))
        if rank == 0:
            files = {name: digest for part in hashes for name, digest in part.items()}
            write_state(snapshot.state, files, partial)
    if rank == 0:
        folder.child(STATE_FILE).upload()


def _enter_folder(stack: ExitStack, folder: RemotePath, rank: int) -> str:
    """The folder that this worker makes to write in; empty if it writes in that of rank 0."""
    if rank == 0:
        return str(stack.enter_context(atomic_dir(folder.local)))
    return stack.enter_context(tempfile.TemporaryDirectory()) if folder.uri is not None else ""


def _save(snapshot: Snapshot, folder: Path) -> None:
    tensors = {**snapshot.weights, **snapshot.optimizer}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(tensors, storage_writer=writer, process_group=host_mesh().get_group())
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def _publish(partial: Path, folder: RemotePath, rank: int) -> dict[str, str]:
    """Upload the files that this worker has written; returns their SHA-256 by name."""
    own = sorted(partial.glob(f"shard-{rank + 1:05}-*"))
    for file in own:
        RemotePath(file, folder.child(file.name).uri, folder.field).upload()
    return {file.name: sha256(file) for file in own}


def _exchange(own: Callable[[], _T]) -> list[_T]:
    """What `own` returns on every worker, by rank. Raises its OSError or UserError on all of them."""
    result: _T | Exception
    try:
        result = own()
    except (OSError, UserError) as error:
        result = error
    results: list[_T | Exception] = [result] * dist.get_world_size()
    dist.all_gather_object(results, result, host_mesh().get_group())
    values = []
    for value in results:
        if isinstance(value, Exception):
            raise value
        values.append(value)
    return values


def full_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Copies of the trained weights by name. Of a sharded model, on rank 0 only: a collective operation.

    Sharded weights are gathered one at a time into files of `folder`, so that they need not fit into memory.
    They are valid as long as the folder exists.
    """
    weights = trained_weights(model)
    if not any(isinstance(weight, DTensor) for weight in weights.values()):
        return {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
    gathered = {}
    for number, (name, weight) in enumerate(weights.items()):
        full = to_full(weight)
        if dist.get_rank() == 0:
            file = str(folder / str(number))
            copy = torch.from_file(file, shared=True, size=full.numel(), dtype=full.dtype)
            gathered[name] = copy.view(full.shape).copy_(full)
    return gathered
