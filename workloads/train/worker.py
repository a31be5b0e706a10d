"""Ray Train worker: build model and data streams, run the training loop, save the result."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray.train
import ray.train.torch
from ray.train.collective import broadcast_from_rank_zero
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from parallelmind.config import TrainConfig
from parallelmind.crash_report import keep_traceback
from parallelmind.data.batch_server import ShardAssignment
from parallelmind.data.held_out import HeldOut
from parallelmind.data.packing import make_batch
from parallelmind.data.pipeline import receive_batches, start_batch_server
from parallelmind.errors import translate_write_errors
from parallelmind.layout import Batch
from parallelmind.model.adapter import save_trained
from parallelmind.model.manifest import MANIFEST, SAMPLES, check_replaceable
from parallelmind.storage import atomic_dir, partial_dir, remove_partial_dirs
from parallelmind.training.build import build_model
from parallelmind.training.checkpoint_manager import (
    CheckpointManager,
    CheckpointWriter,
    download_checkpoint,
)
from parallelmind.training.loop import TrainingInputs, train
from parallelmind.training.outcome import Outcome
from parallelmind.training.sharded_checkpoint import full_weights
from parallelmind.wandb_run import WandbTarget
from workloads.common import resources
from workloads.train.page_samples import read_samples
from workloads.train.provenance import save_loss_plot
from workloads.train.ray_hooks import RayHooks
from workloads.train.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """Input of every worker; paths and the tracking URI are absolute.

    batches_per_epoch: of all workers, estimated.
    """

    config: TrainConfig
    run_dir: RunDir
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    mlflow_uri: str
    mlflow_run: str
    batches_per_epoch: int
    wandb: WandbTarget | None = None


@keep_traceback()
def run_worker(task: WorkerTask) -> Outcome:
    """Train on this worker's share of the batch server's batches.

    Rank 0 starts the batch server, and writes the checkpoints and, when the run is finished, the result.
    Raises UserError for a model that cannot be trained with these settings.
    """
    threads = resources.use_reserved_cpus()
    logging.getLogger().setLevel(logging.WARNING)  # Ray logs every report at INFO
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    config, context = task.config, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    writer = _checkpoint_writer(task, rank)
    with (
        closing(writer) if writer else nullcontext(),
        RayHooks(task.run_dir, task.mlflow_uri, task.mlflow_run, rank == 0, task.wandb) as hooks,
    ):
        group, checkpoint = _agree_on_start(task, writer, hooks)
        batch_server = _share_batch_server(task, threads)
        hooks.print_line(f"{workers} of {config.workers.num_workers} workers, threads of each: {threads}")
        device = ray.train.torch.get_device()
        model, tokenizer = build_model(config, device)
        inputs = TrainingInputs(
            config,
            task.run_dir.config_hash,
            model,
            _batch_stream(task, batch_server, group, tokenizer, hooks),
            hooks,
            task.batches_per_epoch,
            validation_batches(task, tokenizer, rank, workers),
            writer,
            task.mlflow_run,
            device,
        )
        outcome = train(inputs, checkpoint)
        if outcome.finished:
            save_result(task, model, tokenizer, hooks, outcome, is_leader=rank == 0)
    return outcome


def _checkpoint_writer(task: WorkerTask, rank: int) -> CheckpointWriter | None:
    """What writes this worker's part of the checkpoints: all of them, its shards, or nothing."""
    config, path = task.config, task.run_dir.checkpoints
    if rank == 0:
        return CheckpointManager(path, config.checkpoint.keep_checkpoints)
    return CheckpointWriter(path) if config.workers.sharding == "full" else None


def _agree_on_start(
    task: WorkerTask, writer: CheckpointWriter | None, hooks: RayHooks
) -> tuple[str, Path | None]:
    """Name of this worker group, and local folder of the checkpoint to resume from; rank 0 chooses both."""
    newest = None
    if isinstance(writer, CheckpointManager):
        newest = writer.resume(task.run_dir.config_hash, hooks.print_line)
    group, name = broadcast_from_rank_zero((uuid4().hex, newest and newest.name))
    if name is None:
        return group, None
    checkpoint = task.run_dir.checkpoints.child(name)
    hooks.print_line(f"resuming from {checkpoint}")
    return group, download_checkpoint(checkpoint)


def _share_batch_server(task: WorkerTask, max_readers: int) -> Any:
    """The batch server of all workers, on the node of rank 0."""
    context, config, server = ray.train.get_context(), task.config, None
    if context.get_world_rank() == 0:
        server = start_batch_server(
            task.train_files,
            config.data,
            config.model,
            config.optimizer.seed,
            context.get_world_size(),
            max_readers,
        )
    return broadcast_from_rank_zero(server)


def _batch_stream(
    task: WorkerTask, batch_server: Any, group: str, tokenizer: PreTrainedTokenizerBase, hooks: RayHooks
) -> Callable[[int, int], Iterator[Batch]]:
    """This worker's batches of an epoch, from a given batch on."""
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()

    def stream(epoch: int, first: int) -> Iterator[Batch]:
        counts: Counter[str] = Counter()
        assignment = ShardAssignment(group, epoch, first, workers, task.config.batches_per_step)
        for batch in receive_batches(batch_server, assignment, rank, counts):
            yield batch.collate(task.config.rope, tokenizer.pad_token_id or 0, task.config.data.packing)
        if any(counts.values()):
            hooks.print_line(
                f"epoch {epoch}: {counts['truncated']} texts truncated, {counts['skipped']} skipped"
            )

    return stream


def validation_batches(
    task: WorkerTask, tokenizer: PreTrainedTokenizerBase, rank: int, workers: int
) -> dict[int, list[Batch]]:
    """This worker's batches of the held-out data, by branches per sample; the text is the same at each."""
    if not task.validation_files:
        return {}
    config, pad_id = task.config, tokenizer.pad_token_id or 0
    metrics = config.metrics
    held_out = HeldOut.read(task.validation_files, metrics.validation_samples, tokenizer, config.data)
    batches = {}
    for branches in metrics.validation_branches if config.rope.patch_rope else [1]:
        own = held_out.batches(branches, config.optimizer.seed)[rank::workers]
        batches[branches] = [
            make_batch(samples, config.rope, pad_id, packing=config.data.packing) for samples in own
        ]
    return batches


def save_result(
    task: WorkerTask,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    hooks: RayHooks,
    outcome: Outcome,
    is_leader: bool,
) -> None:
    """Save the trained adapter or model where the run is tracked, and to the run folder.

    The folder gets its name last, so a run that is killed earlier repeats this step when it resumes.
    """
    local = task.run_dir.path.local
    if is_leader:
        remove_partial_dirs(local)
    with partial_dir(local if is_leader else None) as scratch:
        weights = full_weights(model, scratch)  # a collective operation where the model is sharded
        if is_leader:
            _write_result(task, model, tokenizer, hooks, outcome, weights)


def _write_result(
    task: WorkerTask,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    hooks: RayHooks,
    outcome: Outcome,
    weights: Mapping[str, Tensor],
) -> None:
    run_dir, result = task.run_dir, task.run_dir.result
    extra = {
        "run": run_dir.name,
        "mlflow_run": task.mlflow_run,
        "step": outcome.step,
        "metrics": outcome.metrics,
        SAMPLES: read_samples(task.validation_files, task.config.metrics.page_samples, tokenizer),
    }
    check_replaceable(result.local, "adapter" if task.config.optimizer.tuning == "lora" else "model")
    with atomic_dir(result.local) as folder:
        with translate_write_errors("output_dir", task.config.run.output_dir, SafetensorError):
            save_trained(model, tokenizer, folder, task.config, extra, weights)
        save_loss_plot(run_dir)
        hooks.finish(folder)
    result.upload(last=MANIFEST)
