"""Fit: Ray Train runs the workers, and starts again from the newest checkpoint when it loses one."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray.train
import torch.distributed
from ray.train import UserCallback, WorkerGroupError
from ray.train.torch import TorchTrainer

from parallelmind.config import WorkersConfig
from parallelmind.crash_report import root_cause
from parallelmind.errors import UserError, first_line
from parallelmind.training.checkpoint_manager import checkpoint_names
from parallelmind.training.outcome import Outcome
from workloads.common import resources
from workloads.common.placement_groups import remove_placement_groups_of_lost_actors
from workloads.train.prepare import PreparedRun
from workloads.train.run_dir import is_write_error
from workloads.train.torch_backend import CheckedTorchConfig
from workloads.train.worker import WorkerTask, run_worker

_MAX_RESTARTS = 3  # without a new checkpoint between them
# If Ray ends an actor for lack of memory, it may raise OutOfMemoryError, which is no RayActorError.
_LOST_CONTROLLER = (ray.train.ControllerError, ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
_LOSS_ERRORS = (
    ray.exceptions.RayError,
    ray.train.ControllerError,
    torch.distributed.DistError,
    ConnectionError,
    TimeoutError,
)


def _print_restart(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fit(
    run: PreparedRun,
    cpus_per_trial: int | None = None,
    callbacks: Sequence[UserCallback] = (),
    on_restart: Callable[[str], None] = _print_restart,
) -> Outcome:
    """Train with Ray Train, and restart from the newest checkpoint when a worker, node or controller is lost.

    cpus_per_trial: CPUs of the run if it is a trial of a sweep; None: it has the cluster. callbacks: passed
    to Ray Train. on_restart: receives a line before each restart: what was lost, and why.

    Raises:
        UserError: an error that the user can correct, or repeated losses without progress. An exception of
            any other kind that a worker raises is final as well.
    """
    config, run_dir = run.task.config, run.task.run_dir
    cpus_per_worker = _worker_reservation(config.workers, cpus_per_trial)
    if cpus_per_trial is None:
        _print_shortage(config.workers, cpus_per_worker())
    losses, progress = 0, checkpoint_names(run_dir.checkpoints)
    while True:
        try:
            result = _trainer(run.task, cpus_per_worker(), callbacks).fit()
        except (WorkerGroupError, *_LOST_CONTROLLER) as error:
            previous, progress = progress, checkpoint_names(run_dir.checkpoints)
            losses = losses + 1 if previous == progress else 1
            raise_if_final(error, losses)
            lost = "worker" if isinstance(error, WorkerGroupError) else "controller"
            remove_placement_groups_of_lost_actors()
            on_restart(f"lost a {lost}; restarting from the newest checkpoint ({_reason(error)})")
        else:
            outcome = result.return_value  # type: ignore[attr-defined]  # Ray types its V1 classes
            assert isinstance(outcome, Outcome)
            return outcome
        finally:
            run_dir.ray_storage.delete()  # a crash may have truncated Ray Train's files


def _worker_reservation(workers: WorkersConfig, cpus_per_trial: int | None) -> Callable[[], float]:
    """A function that returns the CPUs to reserve for each worker, to be called at every start.

    An elastic run keeps the share of a node that it started with: with a smaller one, a worker of a lost node
    would crowd those of another node. Any other run divides the nodes that are left.
    """
    if cpus_per_trial is not None:
        trial_share = resources.cpus_per_trial_worker(cpus_per_trial, workers.num_workers)
        return lambda: trial_share
    if workers.min_workers is not None:
        share = resources.cpus_per_worker(workers.num_workers, workers.use_gpu is True)
        return lambda: share
    return lambda: resources.cpus_per_worker(workers.num_workers, workers.use_gpu is True)


def _print_shortage(workers: WorkersConfig, cpus: float) -> None:
    """Say what the run waits for, if other jobs have the cluster. cpus: CPUs of each worker."""
    lacking = resources.shortage(workers.min_workers or workers.num_workers, cpus, workers.use_gpu is True)
    if lacking:
        print(f"waiting for {lacking}; training starts when they are free", file=sys.stderr, flush=True)


def raise_if_final(error: Exception, losses: int) -> None:
    """Raise an error that a restart cannot repair.

    losses: consecutive losses without a new checkpoint.
    """
    failures = _failures(error)
    causes = {rank: root_cause(failure) for rank, failure in failures.items()}
    for cause in causes.values():
        if isinstance(cause, UserError) or is_write_error(cause):
            raise cause from error
    # A worker that raises ends the others: they report a lost peer.
    crashed = {rank: failures[rank] for rank, cause in causes.items() if not _is_loss(cause)}
    if crashed:
        raise WorkerGroupError(f"workers {sorted(crashed)} raised", crashed) from error
    if losses > _MAX_RESTARTS:
        raise UserError(
            f"num_workers: lost {losses} times without a new checkpoint between ({_reason(error)}); "
            "if memory ran out, lower batch_size, max_branches_per_sample or max_sample_tokens, or set "
            "gradient_checkpointing=true"
        ) from error


def _failures(error: Exception) -> dict[int, Exception]:
    """The failure of every failed worker by rank."""
    return error.worker_failures if isinstance(error, WorkerGroupError) else {0: error}


def _is_loss(error: BaseException) -> bool:
    """Whether an error reports a lost process, its own or a peer's; gloo raises a plain RuntimeError."""
    kind, text = type(error), str(error)
    if kind is ray.exceptions.RayError or (kind is ray.exceptions.RaySystemError and "raceback" in text):
        return False  # an exception that cannot be pickled, or one of unpickling
    is_from_ray_train = kind.__module__.startswith("ray.train.")
    return isinstance(error, _LOSS_ERRORS) or is_from_ray_train or "gloo/transport" in text


def _reason(error: Exception) -> str:
    """Why a process was lost, in one line. The process that ended says more than those that lost a peer."""
    causes = [root_cause(failure) for failure in _failures(error).values()]
    ended = [cause for cause in causes if isinstance(cause, ray.exceptions.RayError)]
    cause = (ended or causes)[0]
    detail = re.search(r"(?<=Worker exit detail: ).*", str(cause))
    return detail[0].strip() if detail else first_line(cause)


def _trainer(task: WorkerTask, cpus: float, callbacks: Sequence[UserCallback]) -> TorchTrainer:
    """Ray Train's trainer for the run. cpus: CPUs to reserve for each worker."""
    workers = task.config.workers
    use_gpu = workers.use_gpu is True
    num_workers = (
        workers.num_workers if workers.min_workers is None else (workers.min_workers, workers.num_workers)
    )
    storage_path, filesystem = task.run_dir.path.pyarrow_filesystem()
    # Checkpoints are this project's own: written in the background, hashed, and skipped when damaged, which
    # those of Ray Train are not.
    return TorchTrainer(
        functools.partial(run_worker, task),  # type: ignore[arg-type]
        torch_config=CheckedTorchConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,  # type: ignore[arg-type]  # Ray types its V1 classes
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, "GPU": int(use_gpu)},
            # GPUs near each other, CPU workers spread over the nodes.
            placement_strategy="PACK" if use_gpu else "SPREAD",
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=task.run_dir.ray_storage.local.name,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            callbacks=list(callbacks),  # type: ignore[arg-type]
            # The driver raises the error with its traceback; Ray would print it a second time.
            logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
        ),
    )
