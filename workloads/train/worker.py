"""What every Ray Train worker runs: build model and data streams, hand them to the training loop, keep its
results.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from parallelmind.config import TrainConfig
from parallelmind.data.batch_server import ShardAssignment
from parallelmind.data.held_out import HeldOut
from parallelmind.data.packing import make_batch
from parallelmind.data.pipeline import receive_batches
from parallelmind.errors import translate_write_errors
from parallelmind.layout import Batch
from parallelmind.model.adapter import add_lora, resume_adapter, save_trained
from parallelmind.model.base_model import load_base
from parallelmind.model.lm_head import check_lm_head
from parallelmind.model.manifest import MANIFEST, check_replaceable
from parallelmind.model.patch import patch
from parallelmind.remote import RemotePath
from parallelmind.storage import atomic_dir, remove_partial_dirs
from parallelmind.training.checkpoint import CheckpointManager, download, whole_weights
from parallelmind.training.loop import Job, train
from parallelmind.training.outcome import Outcome
from workloads.common.stopping import StopFile
from workloads.train.command import CHECKPOINTS, STOP, result_place
from workloads.train.provenance import keep_losses

if TYPE_CHECKING:
    from parallelmind.tracking import Tracker


@dataclass(frozen=True, slots=True)
class Task:
    """What the driver settled; paths and the tracking URI are absolute. place: the run's folder. per_epoch:
    batches, about.

    threads: of each worker.
    """

    config: TrainConfig
    place: RemotePath
    validation_files: tuple[str, ...]
    mlflow_uri: str
    mlflow_run: str
    per_epoch: int
    threads: int


class RayHooks:
    """Metrics to MLflow and lines to the terminal from rank 0; reports, which are a barrier, from every
    worker.
    """

    def __init__(self, task: Task, leads: bool) -> None:
        self.leads, self._stop = leads, StopFile(task.place.child(STOP)) if leads else None
        self._opening = ThreadPoolExecutor(1).submit(_open_tracker, task) if leads else None

    @property
    def tracker(self) -> Tracker | None:
        return self._opening.result() if self._opening else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.tracker:
            self.tracker.log_metrics(metrics, step)

    def say(self, line: str) -> None:
        if self.leads:
            print(line, flush=True)

    def should_stop(self) -> bool:
        return self._stop is not None and self._stop.is_requested()

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        ray.train.report({**metrics, "step": step})


def _open_tracker(task: Task) -> Tracker:
    """While the first step runs: importing MLflow and opening its database takes seconds."""
    from parallelmind.tracking import Tracker

    return Tracker(task.mlflow_uri, task.mlflow_run)


def run_worker(task: Task, feeder: Any) -> Outcome:
    """Train on this worker's turns of the feeder's batches; rank 0 writes checkpoints, and the adapter at the
    end.

    Raises UserError for what the model refuses.
    """
    torch.set_num_threads(min(task.threads, os.cpu_count() or 1))
    logging.getLogger().setLevel(logging.WARNING)  # Ray tells every report at INFO
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    config, context = task.config, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    hooks = RayHooks(task, leads=rank == 0)
    store = (
        CheckpointManager(task.place.child(CHECKPOINTS), config.checkpoint.keep_checkpoints)
        if rank == 0
        else None
    )
    try:
        found = store.resume(config.fingerprint(), hooks.say) if store else None
        group, newest = broadcast_from_rank_zero((uuid4().hex, found and found.name))
        resume = None
        if newest is not None:
            saved = task.place.child(CHECKPOINTS).child(newest)
            hooks.say(f"resuming from {saved}")
            resume = download(saved)
        if config.workers.min_workers is not None:
            hooks.say(f"{workers} of {config.workers.num_workers} workers")
        model, tokenizer = build_model(config)

        def stream(epoch: int, first: int) -> Iterator[Batch]:
            counts: Counter[str] = Counter()
            for chosen in receive_batches(
                feeder, ShardAssignment(group, epoch, first, workers), rank, counts
            ):
                yield chosen.collate(config.rope, tokenizer.pad_token_id or 0)
            if any(counts.values()):
                hooks.say(
                    f"epoch {epoch}: {counts['truncated']} texts truncated, {counts['skipped']} branches skipped"
                )

        held_out = validation_sets(task, tokenizer, rank, workers)
        outcome = train(
            Job(config, model, stream, hooks, task.per_epoch, held_out, store, task.mlflow_run), resume
        )
    finally:
        if store:
            store.close()
    if outcome.finished:
        keep(task, model, tokenizer, hooks, outcome)
    return outcome


def keep(
    task: Task, model: nn.Module, tokenizer: PreTrainedTokenizerBase, hooks: RayHooks, outcome: Outcome
) -> None:
    """Write what was trained, to MLflow and in the run's folder. Its name there comes last and vouches for
    all: a run that is killed on the way does the rest when the same command goes on with it.
    """
    weights = whole_weights(model)  # by every worker: they may hold shards
    if hooks.tracker is None:
        return
    extra = {
        "run": task.place.local.name,
        "mlflow_run": task.mlflow_run,
        "step": outcome.step,
        "metrics": outcome.metrics,
    }
    result = result_place(task.config, task.place)
    check_replaceable(result.local)
    remove_partial_dirs(task.place.local)
    with atomic_dir(result.local) as built:
        with translate_write_errors("output_dir", task.config.run.output_dir, SafetensorError):
            save_trained(model, tokenizer, built, task.config, extra, weights)
        hooks.tracker.log_folder(built, result.local.name)
        keep_losses(task.place, hooks.tracker)
        hooks.tracker.finish()
    result.upload(last=MANIFEST)


def build_model(config: TrainConfig) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The patched model with what is to be trained, float32 there, on this worker's device."""
    base = config.model
    model, tokenizer = load_base(
        base if config.optimizer.tuning == "lora" else base.model_copy(update={"dtype": "float32"})
    )
    check_lm_head(model)
    if config.rope.patch_rope:
        patch(model, config.rope)
    learner: nn.Module = model
    if config.optimizer.resume_adapter is not None:
        learner = resume_adapter(model, tokenizer, config.optimizer.resume_adapter, config.lora)
    elif config.optimizer.tuning == "lora":
        learner = add_lora(model, config.lora, config.optimizer.seed)
    return learner.to(ray.train.torch.get_device()), tokenizer


def validation_sets(
    task: Task, tokenizer: PreTrainedTokenizerBase, rank: int, workers: int
) -> dict[int, list[Batch]]:
    """This worker's batches of the same held-out text at every branch count."""
    if not task.validation_files:
        return {}
    config, rope, pad = task.config, task.config.rope, tokenizer.pad_token_id or 0
    held_out = HeldOut.read(task.validation_files, config.metrics.validation_samples, tokenizer, config.data)
    counts = config.metrics.validation_branches if config.rope.patch_rope else [1]
    return {
        n: [
            make_batch(group, rope, pad)
            for group in held_out.batches(n, config.optimizer.seed)[rank::workers]
        ]
        for n in counts
    }
