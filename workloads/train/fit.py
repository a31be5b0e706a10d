"""Ray Train around one training run, and what becomes of losses on the way."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray.train
import torch.distributed
from ray.train import UserCallback
from ray.train.torch import TorchTrainer

from parallelmind.data.pipeline import start_batch_server
from parallelmind.errors import UserError, first_line
from parallelmind.training import checkpoint
from parallelmind.training.outcome import Outcome
from workloads.common import resources
from workloads.train.command import CHECKPOINTS, is_unwritable
from workloads.train.worker import Task, run_worker

_RESTARTS = (
    3  # how often what was lost is replaced, without a new checkpoint between, before the run is given up
)
_LOST = (
    ray.exceptions.RayError,
    ray.train.ControllerError,
    torch.distributed.DistError,
    ConnectionError,
    TimeoutError,
)
_WRAPPERS = ("_base_exc", "health_check_failure", "cause")  # where Ray's errors keep what they tell of
_RAY = ".ray"  # Ray Train's folder in the run's


def fit(task: Task, files: list[str], beside: int = 1, callbacks: Sequence[UserCallback] = ()) -> Outcome:
    """Ray Train, again from the newest checkpoint whenever a part of it was lost. An error that a worker
    raised is final.

    beside: how many runs share the cluster. callbacks: of Ray Train. Raises UserError for what the user can
    mend.
    """
    config = task.config
    elastic = config.workers.min_workers is not None and not config.workers.use_gpu
    of_a_node = resources.cpus_per_elastic_worker(config.workers.num_workers) if elastic else None
    saved = task.place.child(CHECKPOINTS)
    lost, reached = 0, checkpoint.written(saved)
    while True:
        feeder = start_batch_server(
            files, config.data, config.model, config.optimizer.seed, config.workers.num_workers
        )
        try:
            result = _trainer(
                task,
                feeder,
                of_a_node or resources.cpus_per_worker(config.workers.num_workers * beside),
                callbacks,
            ).fit()
        except (ray.train.WorkerGroupError, ray.train.ControllerError, ray.exceptions.RayActorError) as error:
            before, reached = reached, checkpoint.written(saved)
            lost = lost + 1 if before == reached else 1
            _end_if_final(error, lost)
            what = "worker" if isinstance(error, ray.train.WorkerGroupError) else "controller"
            print(f"lost a {what}; starting again from the newest checkpoint", file=sys.stderr, flush=True)
        else:
            outcome = result.return_value  # type: ignore[attr-defined]  # Ray types its V1 classes
            assert isinstance(outcome, Outcome)
            return outcome
        finally:
            ray.kill(feeder)
            task.place.child(_RAY).delete()  # its notes of this start, which a crash may have cut short


def _end_if_final(error: Exception, lost: int) -> None:
    """Raise what cannot be mended by starting again. lost: how often in a row something was lost before a new
    checkpoint.
    """
    causes = [_root(cause) for cause in getattr(error, "worker_failures", {}).values()] or [error]
    if told := next(
        (cause for cause in causes if isinstance(cause, UserError) or is_unwritable(cause)), None
    ):
        raise told from error
    if not any(map(_is_loss, causes)):
        raise error
    if lost > _RESTARTS:
        raise UserError(
            f"num_workers: lost {lost} times without a new checkpoint between ({first_line(causes[0])}); if memory ran out, "
            "lower batch_size, max_branches_per_sample or max_sample_tokens, or set gradient_checkpointing=true"
        ) from error


def _is_loss(error: BaseException) -> bool:
    """Whether it tells of a loss: of whatever raised it, or of another worker, for which gloo has no error of
    its own.
    """
    return isinstance(error, _LOST) or "gloo/transport" in str(error)


def _root(error: BaseException) -> BaseException:
    """What a worker raised, or the feeder that it asked, under Ray's wrappers."""
    while (inner := next(filter(None, (getattr(error, name, None) for name in _WRAPPERS)), None)) is not None:
        error = inner
    return error


def _trainer(task: Task, feeder: Any, cpus: float, callbacks: Sequence[UserCallback]) -> TorchTrainer:
    """cpus: of each worker."""
    config = task.config
    workers = (
        config.workers.num_workers
        if config.workers.min_workers is None
        else (config.workers.min_workers, config.workers.num_workers)
    )
    where, system = task.place.pyarrow_filesystem()
    # Checkpoints are our own: written in the background, hashed, and passed over when damaged, which Ray's
    # are not.
    return TorchTrainer(
        functools.partial(run_worker, task, feeder),  # type: ignore[arg-type]
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # Ray types its V1 classes
            use_gpu=config.workers.use_gpu,
            resources_per_worker={"CPU": cpus, "GPU": int(config.workers.use_gpu)},
            placement_strategy="PACK"
            if config.workers.use_gpu
            else "SPREAD",  # GPUs near each other, CPU workers on all nodes
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=_RAY,
            storage_path=where,
            storage_filesystem=system,
            callbacks=list(callbacks),  # type: ignore[arg-type]
            # An error comes back to the driver with its traceback; Ray would print that a second time.
            logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
        ),
    )
