"""One training run: prepare, fit, conclude."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from parallelmind.config import HubConfig, TrainConfig
from parallelmind.remote import RemotePath
from workloads.common.devices import decide_training
from workloads.common.stopping import run_stoppable
from workloads.train.data_files import DataFiles
from workloads.train.preflight import check_run
from workloads.train.run_dir import RunDir, lock_dir
from workloads.train.same_name import check_no_changed_run, find_run_dir


def run_training(config: TrainConfig) -> RunDir:
    """Train to the end, unless that is done already; returns the run folder.

    Raises:
        UserError: an input that the user can correct.
        KeyboardInterrupt: the run was stopped; its checkpoint is saved.
    """
    config = decide_training(config)
    run_dir = find_run_dir(config)
    if run_dir.is_finished():
        print(f"already finished: {run_dir.result}; change a field or the name to train another run")
        if run_dir.has_unsent():
            from workloads.train.conclude import send_missing

            send_missing(config, run_dir)
        push_result(config.hub, run_dir.result)
        return run_dir
    check_no_changed_run(config, run_dir)
    files = DataFiles.find(config.data)
    check_run(config, files)
    with lock_dir(run_dir.path, config.run.name, config.run.output_dir), ThreadPoolExecutor(1) as executor:
        from workloads.common import cluster

        connecting = executor.submit(cluster.connect, config.services.ray_address)
        # Importing torch and MLflow takes as long as starting Ray: both happen at the same time.
        from workloads.train.conclude import close_tracker, conclude
        from workloads.train.fit import fit
        from workloads.train.prepare import prepare

        run = prepare(config, run_dir, files, wait_for_ray=connecting.result)
        with close_tracker(run.tracker) as set_outcome:
            outcome = run_stoppable(
                lambda: fit(run), run_dir.stop_file().request, "stopping after this step, with a checkpoint"
            )
            set_outcome(outcome)
        conclude(run, outcome)
    push_result(config.hub, run_dir.result)
    return run_dir


def push_result(hub: HubConfig, result: RemotePath) -> None:
    """Upload the result to the hub if `push_to` is set. Raises UserError with the command to repeat it."""
    if hub.push_to:
        from parallelmind.model.push import push  # imports most of huggingface_hub

        print(f"hub      {push(result.location, hub.push_to, hub.push_private)}", flush=True)
