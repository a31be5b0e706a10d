"""Search a space of training runs, on this machine or on a Ray cluster.

    python -m workloads.sweep EXPERIMENT|SWEEP.yaml [key=value …]

EXPERIMENT is a file in experiments/ whose config() returns a SweepConfig: the settings of a training run
(train), what differs between its trials (space, points, seeds), who chooses (search) and what is made small
(metrics). train.FIELD=VALUE overrides a setting of the run. The sweep's folder is train.output_dir/name-hash;
it holds the trials' own folders, report.html, its plots, trials.csv and trials.parquet, and journal.jsonl,
from which the same command goes on after an interruption: trials that ended are not repeated, others go on
from their checkpoints. The best adapter becomes a version of the registered model `register_as`.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING
from uuid import uuid4

from parallelmind import cli
from parallelmind.config import TrainConfig
from parallelmind.config.yaml_file import save_yaml
from parallelmind.data.files import find_files
from parallelmind.remote import RemotePath
from workloads.common.read_config import read_config
from workloads.common.stopping import run_stoppable
from workloads.sweep.config import SweepConfig, check
from workloads.sweep.journal import Journal
from workloads.sweep.trial import Trial
from workloads.train.command import ADAPTER, alone_at, result_place

if TYPE_CHECKING:
    from parallelmind.tracking import Tracker
    from workloads.sweep.trainable import Sweep


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        return cli.print_help(__doc__ or "", SweepConfig)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    run_sweep(read_config(SweepConfig, argv))
    return None


def run_sweep(config: SweepConfig) -> RemotePath:
    """Every trial that is not over yet, then report and registration; returns the sweep's folder.

    Raises UserError, before anything starts, for a space that cannot be trained or does not fit on the
    cluster, and KeyboardInterrupt when stopped, with the trials' checkpoints saved.
    """
    check(config)
    find_files(config.train.data.data_path)
    if config.train.data.validation_path:
        find_files(config.train.data.validation_path, "validation_path")
    place = sweep_place(config)
    with alone_at(place, config.name, config.train.run.output_dir):
        _run(config, place)
    return place


def sweep_place(config: SweepConfig) -> RemotePath:
    """`output_dir/name-hash`. The hash leaves out how many trials there are, and where they run."""
    fields = TrainConfig.flat_fields()
    nowhere = {name: fields[name].default for name in (*TrainConfig.NON_IDENTITY_FIELDS, "name")}
    what = config.model_copy(update={"train": config.train.replace(**nowhere)})
    return RemotePath.at(config.train.run.output_dir).child(f"{config.name}-{what.fingerprint()[:8]}")


def _run(config: SweepConfig, place: RemotePath) -> None:
    from workloads.common import cluster, resources

    cluster.connect(config.train.services.ray_address, forward_output=False)
    slots = resources.max_concurrent_runs(
        config.cpus_per_trial,
        config.train.workers.num_workers,
        config.train.workers.use_gpu,
        config.max_concurrent,
    )

    from workloads.sweep.trainable import Sweep

    settings = place.child("config.yaml")
    save_yaml(config, settings.local)
    settings.upload()
    journal = Journal.read(place.child("journal.jsonl"))
    tracker = _tracker(config, settings, journal)
    sweep = Sweep(config, place, tracker.run_id, slots)
    status = "FAILED"
    try:
        whole = _try(sweep, journal)
        status = "FINISHED" if whole else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        try:
            _settle(journal, tracker)
            _conclude(sweep, journal, tracker, last=status == "FINISHED")
        finally:
            tracker.finish(status)
    if not whole:
        print("stopped; the same command goes on from there", flush=True)
        raise KeyboardInterrupt


def _try(sweep: Sweep, journal: Journal) -> bool:
    """Run the trials; whether all of them are over."""
    from workloads.sweep.tune import run_trials, stop_trial
    from workloads.sweep.view import View

    held = list[Callable[[], None]]()

    def stop() -> None:
        for hold in held:
            hold()
        for trial in list(journal.trials.values()):
            if trial.folder and not trial.ended:
                stop_trial(trial.folder)

    points = None if sweep.config.search == "grid" else sweep.config.trials
    planned = (sum(1 for _ in sweep.config.grid()) if points is None else points) * len(sweep.config.seeds)
    told = "stopping the trials after their next steps, with checkpoints"
    with View(sweep.config, journal, planned, sweep.slots) as view:
        run_stoppable(lambda: run_trials(sweep, journal, view.show, held.append), stop, told)
    return len(journal.trials) >= planned and all(trial.ended for trial in journal.trials.values())


def _tracker(config: SweepConfig, settings: RemotePath, journal: Journal) -> Tracker:
    """The MLflow run that the trials' runs are children of."""
    from parallelmind.tracking import Tracker, absolute_uri

    if "mlflow_key" not in journal.notes:
        journal.note(mlflow_key=uuid4().hex)
    uri = absolute_uri(config.train.services.mlflow_uri)
    tracker = Tracker.start(
        uri,
        config.train.services.mlflow_experiment,
        settings.local.parent.name,
        config,
        journal.notes["mlflow_key"],
    )
    tracker.log_file(settings.local)
    return tracker


def _settle(journal: Journal, tracker: Tracker) -> None:
    """Runs whose process was ended in the middle cannot say so themselves."""
    from parallelmind.tracking import Tracker

    ends = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
    for trial in journal.trials.values():
        if trial.run_id:
            run = Tracker(tracker.uri, trial.run_id)
            run.set_tags({"trial": trial.number, "trial_status": trial.status})
            run.finish(ends.get(trial.status, "KILLED"))


def _conclude(sweep: Sweep, journal: Journal, tracker: Tracker, last: bool) -> None:
    """Report and, where all trials are over, the winner into the registry. Told on stdout."""
    from workloads.sweep.report import write_report
    from workloads.sweep.search import winner

    config, place, trials = sweep.config, sweep.place, list(journal.trials.values())
    best = winner(config, trials) if last else None
    write_report(place.local, config.name, trials, config.metrics, best.number if best else None, command)
    pictures = [path.name for path in place.local.glob("*.png")]
    for file in map(place.child, ("report.html", "trials.csv", "trials.parquet", "journal.jsonl", *pictures)):
        if file.local.is_file():
            file.upload()
            tracker.log_file(file.local)
    if best:
        _register(sweep, best, journal, tracker)
    counts = {
        status: sum(trial.status == status for trial in trials)
        for status in ("finished", "stopped", "failed")
    }
    again = "; the same command repeats those that failed" if last and counts["failed"] else ""
    print(
        f"trials   {', '.join(f'{count} {status}' for status, count in counts.items() if count) or 'none over'}{again}"
    )
    print(f"report   {place.child('report.html')}\nmlflow   run {tracker.run_id}", flush=True)


def _register(sweep: Sweep, best: Trial, journal: Journal, tracker: Tracker) -> None:
    from parallelmind.tracking import register_model

    config, run_id = sweep.config, best.run_id
    assert run_id is not None
    # With each trial that is added another one may win.
    finished = sum(trial.status == "finished" for trial in journal.trials.values())
    tracker.log_metrics({name: best.metrics[name] for name in config.metrics}, finished)
    tracker.set_tags({"winner": best.number, "winner_run": run_id})
    told = "  ".join(
        f"{name.removeprefix('validation/')} {best.metrics[name]:.3f}" for name in config.metrics
    )
    print(f"winner   trial {best.number}: {best.describe()}  {told}")
    result = result_place(sweep.trial(best.number, best.settings), RemotePath.at(str(best.folder)))
    if config.register_as and result.local.name == ADAPTER:
        version = register_model(tracker.uri, run_id, ADAPTER, config.register_as, config.alias)
        print(f"model    models:/{config.register_as}@{config.alias}, version {version}")
    print(f"{result.local.name:8} {result}")


def command(trial: Trial) -> str:
    """The training run of a trial by itself."""
    where = f"{trial.folder}/config.yaml"
    return shlex.join(["python", "-m", "workloads.train", where, "output_dir=runs"]) if trial.folder else ""
