"""Prepare a run: check model and data, write the settings, open the MLflow run."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from uuid import uuid4

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
from transformers import PreTrainedTokenizerBase

from parallelmind.config import TrainConfig
from parallelmind.config.yaml_file import save_yaml
from parallelmind.errors import UserError
from parallelmind.model.base_model import load_meta_model, load_tokenizer
from parallelmind.model.manifest import read_adapter
from parallelmind.model.penalty import check_takes_penalties
from parallelmind.model.support import check_supported
from parallelmind.model.vocabulary import check_vocabulary
from parallelmind.storage import atomic_file
from parallelmind.tracking import Tracker, absolute_uri, store_errors
from parallelmind.training.checkpoint_manager import checkpoint_names
from workloads.train.data_files import DataFiles
from workloads.train.metrics_file import MetricPoint, read_points, write_points
from workloads.train.provenance import code_version
from workloads.train.run_dir import RunDir
from workloads.train.run_tracking import wandb_target
from workloads.train.survey import changed_data, check_limits, data_fields, survey_data
from workloads.train.worker import WorkerTask


@dataclass(frozen=True, slots=True)
class SharedRunContext:
    """What the runs of a sweep share.

    parent: id of their parent MLflow run. group: their group in Weights & Biases.
    data_fingerprint: `PreparedRun.data_fingerprint` of the other runs, where one is known.
    """

    parent: str | None = None
    group: str | None = None
    data_fingerprint: str | None = None


SINGLE_RUN = SharedRunContext()


class PreparedRun(NamedTuple):
    """A run that is ready to train.

    data_fingerprint: of the training data and, where there is any, of the held-out data.
    """

    task: WorkerTask
    tracker: Tracker
    files: DataFiles
    data_fingerprint: str


def begin(config: TrainConfig, run_dir: RunDir) -> PreTrainedTokenizerBase:
    """Download the existing files of the run, write config.yaml and check the model; needs no Ray.

    A run of an earlier version keeps its config.yaml, by which it is found again.

    Returns the tokenizer.

    Raises:
        UserError: the model, its tokenizer or the adapter to resume cannot be used with these settings.
    """
    run_dir.path.download(exclude="*.safetensors")
    if run_dir.config_hash == config.fingerprint():
        save_yaml(config.with_global_batch_size(), run_dir.config_file.local)
        run_dir.config_file.upload()
    run_dir.stop_file().clear()
    tokenizer = load_tokenizer(config.model)
    for note in check_vocabulary(tokenizer, config.model):
        print(f"warning: {note}", file=sys.stderr, flush=True)
    if config.rope.patch_rope:
        model = load_meta_model(config.model)
        check_supported(model)
        check_takes_penalties(model, config.rope)
    if config.optimizer.resume_adapter is not None:
        settings = {**config.rope.model_dump(), **config.lora.model_dump(exclude={"lora_dropout"})}
        settings["add_tokens"] = config.model.add_tokens
        read_adapter(config.optimizer.resume_adapter).check_settings(settings)
    return tokenizer


def prepare(
    config: TrainConfig,
    run_dir: RunDir,
    files: DataFiles,
    wait_for_ray: Callable[[], None] = lambda: None,
    shared: SharedRunContext = SINGLE_RUN,
) -> PreparedRun:
    """Check the model, survey all data and open the MLflow run.

    wait_for_ray: returns when Ray is connected, which the check of the model does not need.

    Raises:
        UserError: the model, its tokenizer or the adapter to resume cannot be used with these settings; bad
            data, trees without the patch, other data than before or than in the other runs of a sweep;
            missing GPUs.
    """
    tokenizer = begin(config, run_dir)
    wait_for_ray()
    data = config.data
    survey, data_fingerprint = survey_data(files, data, config.rope, len(tokenizer), run_dir.quarantine_file)
    if shared.data_fingerprint not in (None, data_fingerprint):
        raise changed_data(data)
    epoch = check_limits(survey, files, config, tokenizer)
    tracker = open_tracker(config, run_dir, data_fingerprint, shared.parent)
    tags = {
        "bad_lines": len(survey.bad),
        "folder": run_dir,
        "data_sha256": survey.fingerprint,
        **code_version(),
    }
    tracker.set_tags(tags)
    task = WorkerTask(
        config,
        run_dir,
        train_files=tuple(files.train),
        validation_files=tuple(files.validation),
        mlflow_uri=tracker.uri,
        mlflow_run=tracker.run_id,
        batches_per_epoch=epoch.batches,
        wandb=wandb_target(config, run_dir, tracker.run_id, shared.group, tags),
    )
    return PreparedRun(task, tracker, files, data_fingerprint)


def open_tracker(
    config: TrainConfig, run_dir: RunDir, data_fingerprint: str, parent: str | None = None
) -> Tracker:
    """Start the run in MLflow, or continue it after an interruption.

    data_fingerprint: `PreparedRun.data_fingerprint`; earlier versions recorded that of the training data.

    Raises:
        UserError: the data has changed since the first checkpoint.
    """
    record_file = run_dir.record_file
    if record_file.local.is_file():
        record = json.loads(record_file.local.read_text(encoding="utf-8"))
    else:  # written before the MLflow run exists: a run whose start is interrupted is found by this key
        record = {"mlflow_key": uuid4().hex, "data_sha256": data_fingerprint}
    recorded, of_training = record["data_sha256"], data_fingerprint.split()[0]
    if recorded not in (data_fingerprint, of_training) and checkpoint_names(run_dir.checkpoints):
        raise UserError(
            f"{data_fields(config.data)}: the records are not those that {run_dir} was started with "
            f"({data_fingerprint}, not {recorded}); restore them, or choose another name"
        )
    with atomic_file(record_file.local) as file:
        file.write(json.dumps({**record, "data_sha256": data_fingerprint}) + "\n")
    record_file.upload()
    services = config.services
    tracker = Tracker.start(
        absolute_uri(services.mlflow_uri),
        services.mlflow_experiment,
        run_dir.name,
        config.with_global_batch_size(),
        record["mlflow_key"],
        parent,
    )
    with store_errors(tracker.uri):
        tracker.log_file(run_dir.config_file.local)
    if not read_points(run_dir.metrics_file):  # a run of version 0.1.0 has its metrics in MLflow only
        write_points(run_dir.metrics_file, _points_of(tracker))
    return tracker


def _points_of(tracker: Tracker) -> list[MetricPoint]:
    """The metrics that MLflow has of a run, by step."""
    by_step = defaultdict[int, dict[str, float]](dict)
    for name in tracker.metric_names():
        for step, value in tracker.metric_history(name):
            by_step[step][name] = value
    return [MetricPoint(step, 0, by_step[step]) for step in sorted(by_step)]
