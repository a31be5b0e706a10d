"""The end of a sweep: MLflow runs are closed, the report is written, the winner is registered."""

from __future__ import annotations

import shlex

from parallelmind import cli
from parallelmind.errors import UserError
from parallelmind.redaction import redact_uri
from parallelmind.tracking import (
    STORE_ERRORS,
    Tracker,
    go_on_without_store,
    register_model,
    store_problem,
)
from workloads.sweep.journal import Journal
from workloads.sweep.progress import format_metrics
from workloads.sweep.ranking import find_winner
from workloads.sweep.report import write_report
from workloads.sweep.trainable import SweepContext
from workloads.sweep.trial import END_STATUSES, Trial
from workloads.train.conclude import send_missing
from workloads.train.run import push_result
from workloads.train.run_dir import ADAPTER, RunDir
from workloads.train.same_name import find_run_dir


def close_trial_runs(journal: Journal, tracker: Tracker) -> None:
    """Tag and close the MLflow runs of the trials; a killed process leaves its run open."""
    run_statuses = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
    for trial in journal.trials.values():
        if trial.run_id:
            with go_on_without_store(f"the status of trial {trial.number}"):
                trial_run = Tracker(tracker.uri, trial.run_id)
                trial_run.set_tags({"trial": trial.number, "trial_status": trial.status})
                trial_run.finish(run_statuses.get(trial.status, "KILLED"))


def conclude(context: SweepContext, journal: Journal, tracker: Tracker, all_ended: bool) -> None:
    """Write the report and, if all trials have ended, register the winner. Prints the results."""
    trials = list(journal.trials.values())
    winner = find_winner(context.config, trials) if all_ended else None
    _publish_report(context, trials, winner, tracker)
    _send_missing_results(context, trials)
    if winner:
        _log_winner(context, winner, trials, tracker)
        metrics = format_metrics(winner, context.config.metrics)
        print(f"winner   trial {winner.number}: {winner.describe()}  {metrics}")
        run_dir = find_run_dir(context.trial_config(winner.number, winner.settings))
        print(f"{run_dir.result_name:8} {run_dir.result}")
    elif all_ended:
        print(f"winner   none: no point has finished all its trials with {', '.join(context.config.metrics)}")
    counts = {status: sum(trial.status == status for trial in trials) for status in END_STATUSES}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "none ended"
    if all_ended and counts["failed"]:
        summary += "; the same command repeats the failed trials"
    print(f"trials   {summary}")
    print(f"report   {context.sweep_dir.child('report.html')}\nmlflow   run {tracker.run_id}", flush=True)
    if winner:
        _register(context, winner, run_dir, tracker.uri)
        push_result(context.config.train.hub, run_dir.result)


def train_command(trial: Trial) -> str:
    """The command that trains a trial again by itself; empty if the trial never ran."""
    if not trial.folder:
        return ""
    config_path = f"{trial.folder}/config.yaml"
    return cli.as_typed(shlex.join(["python", "-m", "workloads.train", config_path, "output_dir=runs"]))


def _publish_report(
    context: SweepContext, trials: list[Trial], winner: Trial | None, tracker: Tracker
) -> None:
    """Write the report, upload it and log it to MLflow."""
    config, folder = context.config, context.sweep_dir.local
    number = winner.number if winner else None
    write_report(folder, config.name, trials, config.metrics, number, train_command)
    plots = [path.name for path in folder.glob("*.png")]
    for name in ("report.html", "trials.csv", "trials.parquet", "journal.jsonl", *plots):
        file = context.sweep_dir.child(name)
        if file.local.is_file():
            file.upload()
            with go_on_without_store(name):
                tracker.log_file(file.local)


def _log_winner(context: SweepContext, winner: Trial, trials: list[Trial], tracker: Tracker) -> None:
    """Log the winner's metrics to the sweep's run, at the number of finished trials as the step.

    A sweep that resumes with more trials may have another winner.
    """
    finished = sum(trial.status == "finished" for trial in trials)
    with go_on_without_store("the winner"):
        tracker.log_metrics({name: winner.metrics[name] for name in context.config.metrics}, finished)
        tracker.set_tags({"winner": winner.number, "winner_run": winner.run_id})


def _send_missing_results(context: SweepContext, trials: list[Trial]) -> None:
    """Send what the tracking stores lack of finished trials, until a store fails again."""
    for trial in trials:
        if trial.status != "finished":
            continue
        config = context.trial_config(trial.number, trial.settings)
        run_dir = find_run_dir(config)
        if run_dir.has_unsent():
            send_missing(config, run_dir, context.sweep_dir.local.name)
            if run_dir.has_unsent():
                return


def _register(context: SweepContext, winner: Trial, run_dir: RunDir, uri: str) -> None:
    """Register the winner's adapter as `register_as`, if that is set.

    Raises UserError if the store fails or lacks the adapter.
    """
    registry = context.config.registry
    if not registry.register_as or run_dir.result_name != ADAPTER:
        return
    assert winner.run_id is not None
    problem = "it lacks the adapter"
    try:
        if run_dir.unsent_file("mlflow").read_bytes() is None:
            version = register_model(uri, winner.run_id, ADAPTER, registry.register_as, registry.alias)
            print(f"model    models:/{registry.register_as}@{registry.alias}, version {version}", flush=True)
            return
    except STORE_ERRORS as error:
        problem = store_problem(error)
    raise UserError(
        f"register_as={registry.register_as}: is not registered in mlflow_uri={redact_uri(uri)} ({problem}); "
        "the same command registers it"
    )
