"""The driver of a sweep: connect, run the trials, conclude."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import workloads.sweep.tune_env  # noqa: F401  (before Ray)

# isort: split
from parallelmind.config.yaml_file import save_yaml
from parallelmind.remote import RemotePath
from parallelmind.tracking import Tracker, absolute_uri, go_on_without_store, store_errors
from workloads.common import cluster, resources
from workloads.common.stopping import run_stoppable
from workloads.sweep.conclusion import close_trial_runs, conclude
from workloads.sweep.config import SweepConfig
from workloads.sweep.journal import Journal
from workloads.sweep.progress import ProgressView
from workloads.sweep.scheduler import stop_trial
from workloads.sweep.trainable import TRIALS, SweepContext
from workloads.sweep.tune import run_trials


def execute(config: SweepConfig, sweep_dir: RemotePath) -> None:
    """Run the trials, write the report and register the winner. See `workloads.sweep.command.run_sweep`."""
    train = config.train
    cluster.connect(train.services.ray_address, forward_output=False)
    max_concurrent = resources.max_concurrent_runs(
        config.resources.cpus_per_trial,
        train.workers.num_workers,
        train.workers.use_gpu is True,
        config.resources.max_concurrent,
    )
    config_file = sweep_dir.child("config.yaml")
    save_yaml(config, config_file.local)
    config_file.upload()
    journal = Journal.open(sweep_dir.child("journal.jsonl"))
    tracker = _start_tracker(config, config_file, journal)
    context = SweepContext(config, sweep_dir, tracker.run_id, max_concurrent)
    status = "FAILED"
    try:
        all_ended = _run_trials(context, journal)
        status = "FINISHED" if all_ended else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if journal.error is None:  # a sweep without a disk for its journal ends as by a kill
            _end(context, journal, tracker, status)
    if not all_ended:
        print("stopped; the same command resumes the sweep", flush=True)
        raise KeyboardInterrupt


def _start_tracker(config: SweepConfig, config_file: RemotePath, journal: Journal) -> Tracker:
    """Start or resume the sweep's MLflow run, the parent of the trials' runs."""
    if "mlflow_key" not in journal.notes:
        journal.add_notes(mlflow_key=uuid4().hex)
    tracker = Tracker.start(
        absolute_uri(config.train.services.mlflow_uri),
        config.train.services.mlflow_experiment,
        config_file.local.parent.name,
        config,
        journal.notes["mlflow_key"],
    )
    with store_errors(tracker.uri):
        tracker.log_file(config_file.local)
    return tracker


def _run_trials(context: SweepContext, journal: Journal) -> bool:
    """Run the trials until they end or are stopped; returns whether all trials of the sweep have ended."""
    stop_hooks = list[Callable[[], None]]()

    def request_stop() -> None:
        for hook in stop_hooks:
            hook()
        for trial in list(journal.trials.values()):
            if trial.folder and not trial.ended:
                folder = context.sweep_dir.child(TRIALS).child(Path(trial.folder).name)
                stop_trial(folder.location)

    config = context.config
    planned = _count_trials(config)
    message = "stopping the trials after their next steps, with checkpoints"
    with ProgressView(config.name, config.metrics, journal, planned) as view:
        run_stoppable(
            lambda: run_trials(context, journal, view.update, stop_hooks.append), request_stop, message
        )
    return len(journal.trials) >= planned and all(trial.ended for trial in journal.trials.values())


def _end(context: SweepContext, journal: Journal, tracker: Tracker, status: str) -> None:
    """Close the MLflow runs, write the report and register the winner."""
    try:
        close_trial_runs(journal, tracker)
        conclude(context, journal, tracker, all_ended=status == "FINISHED")
    finally:
        with go_on_without_store(f"the status {status} of the sweep"):
            tracker.finish(status)


def _count_trials(config: SweepConfig) -> int:
    """The number of trials of the whole sweep."""
    points = (
        sum(1 for _ in config.search_space.grid())
        if config.strategy.search == "grid"
        else config.strategy.trials
    )
    assert points is not None
    return points * len(config.search_space.seeds)
