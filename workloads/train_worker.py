"""What every Ray Train worker runs: build model and data streams, hand them to the training loop, keep its results."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from parallelmind.config import BaseConfig, DataConfig, LoraConfig, RopeConfig, TrainConfig
from parallelmind.data.files import file_parts
from parallelmind.data.grouping import Row, Seeds, batched, make_batch, regrouped
from parallelmind.data.pipeline import feed, read_part
from parallelmind.layout import Batch
from parallelmind.model.adapter import add_lora, save_adapter
from parallelmind.model.base import load_base
from parallelmind.model.head import refuse_unknown_head
from parallelmind.model.patch import patch
from parallelmind.tracking import Tracker
from parallelmind.training import checkpoint
from parallelmind.training.loop import Job, Outcome, Save, train
from workloads.train import ADAPTER, CHECKPOINTS, STOP


@dataclass(frozen=True, slots=True)
class Task:
    """What the driver settled; paths and the tracking URI are absolute. threads: of each worker."""

    config: TrainConfig
    folder: Path
    validation_files: tuple[str, ...]
    mlflow_uri: str
    mlflow_run: str
    planned: int
    threads: int


class RayHooks:
    """Metrics to MLflow and lines to the terminal from rank 0; reports, which are a barrier, from every worker."""

    def __init__(self, task: Task, leads: bool) -> None:
        self.leads, self.stop_file = leads, task.folder / STOP
        self.tracker = Tracker(task.mlflow_uri, task.mlflow_run) if leads else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.tracker:
            self.tracker.log_metrics(metrics, step)

    def say(self, line: str) -> None:
        if self.leads:
            print(line, flush=True)

    def should_stop(self) -> bool:
        return self.leads and self.stop_file.exists()

    def report(self, metrics: Mapping[str, float], step: int, save: Save | None) -> None:
        values = {**metrics, "step": step}
        if save is None or not self.leads:
            ray.train.report(values)
            return
        with tempfile.TemporaryDirectory() as scratch:
            save(Path(scratch) / "checkpoint")
            ray.train.report(values, checkpoint=ray.train.Checkpoint.from_directory(Path(scratch) / "checkpoint"))


def run_worker(task: Task, feeder: Any) -> Outcome:
    """Train on this worker's turns of the feeder's batches; rank 0 writes the adapter at the end.

    Raises UserError for what the model refuses.
    """
    torch.set_num_threads(task.threads)
    logging.getLogger().setLevel(logging.WARNING)  # Ray tells every report at INFO
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    config, context = task.config, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    model, tokenizer = build_model(config)
    hooks = RayHooks(task, leads=rank == 0)

    def stream(epoch: int, first: int) -> Iterator[Batch]:
        counts: Counter[str] = Counter()
        for group in feed(feeder, epoch, first, workers, rank, counts):
            yield group.batch(config.part(RopeConfig), tokenizer.pad_token_id or 0)
        if any(counts.values()):
            hooks.say(f"epoch {epoch}: {counts['truncated']} texts truncated, {counts['skipped']} branches skipped")

    job = Job(config, model, stream, hooks, task.planned, validation_sets(task, tokenizer, rank, workers), task.mlflow_run)
    resume = checkpoint.newest(task.folder / CHECKPOINTS, config.fingerprint())
    if resume is not None:
        hooks.say(f"resuming from {resume}")
    outcome = train(job, resume)
    if outcome.finished and hooks.tracker:
        parts = config.part(BaseConfig), config.part(RopeConfig), config.part(LoraConfig)
        extra = {"run": task.folder.name, "mlflow_run": task.mlflow_run}
        save_adapter(model, tokenizer, task.folder / ADAPTER, *parts, extra=extra)
        hooks.tracker.log_folder(task.folder / ADAPTER, ADAPTER)
    return outcome


def build_model(config: TrainConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_base(config.part(BaseConfig))
    refuse_unknown_head(model)
    if config.patch_rope:
        patch(model, config.part(RopeConfig))
    return add_lora(model, config.part(LoraConfig), config.seed).to(ray.train.torch.get_device()), tokenizer


def validation_sets(task: Task, tokenizer: PreTrainedTokenizerBase, rank: int, workers: int) -> dict[int, list[Batch]]:
    """This worker's batches of the same held-out text at every branch count."""
    if not task.validation_files:
        return {}
    config = task.config
    rows = list(_first_rows(task, tokenizer))
    found = {}
    for branches in config.validation_branches if config.patch_rope else [1]:
        samples = regrouped(rows, branches, config.validation_samples, config)
        chosen = list(batched(samples, config, Seeds(config.seed).generator()))[rank::workers]
        found[branches] = [make_batch(group, config.part(RopeConfig), tokenizer.pad_token_id or 0) for group in chosen]
    return found


def _first_rows(task: Task, tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    left = task.config.validation_samples
    for part in file_parts(task.validation_files):
        for item, lone in read_part(part, tokenizer, task.config.part(DataConfig)):
            if item.tokens is not None and left > 0:
                yield Row(item.tokens, lone)
                left -= item.tokens.branches
        if left <= 0:
            return
