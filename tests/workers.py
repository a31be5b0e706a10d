"""One of several processes that train together.

    python -m torch.distributed.run … -m workers CASE FOLDER

Each case compares the results of the group with those of one process on the same tokens, and prints a line if
they are equal.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import save_tiny
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallelmind.config import TrainConfig
from parallelmind.data.batch_server import ShardAssignment
from parallelmind.data.packing import EpochSeed, TokenRecord, make_batch, sample_batches
from parallelmind.evaluation.tree_law import law_tree
from parallelmind.layout import Batch, Tokens
from parallelmind.remote import RemotePath
from parallelmind.training.build import build_model
from parallelmind.training.checkpoint_manager import CheckpointManager, CheckpointWriter
from parallelmind.training.collectives import sum_over_workers
from parallelmind.training.loop import TrainingInputs, train
from parallelmind.training.loss import TargetLoss
from parallelmind.training.sharded_checkpoint import full_weights
from parallelmind.training.sharding import shard
from parallelmind.training.step import accumulate_gradients, trainable

ROWS = [
    TokenRecord(Tokens.of([], [[5 + i % 7, 20, *range(30, 31 + i % 9), 40, 2]]), standalone=True)
    for i in range(44)
]
ROWS[4::9] = [TokenRecord(law_tree(), standalone=False)] * len(ROWS[4::9])


def fresh_model(config: TrainConfig) -> nn.Module:
    return build_model(config, torch.device("cpu"))[0]


def settings(**values: object) -> TrainConfig:
    defaults = {
        "data_path": "-",
        "seed": 0,
        "batch_size": 3,
        "branches_per_sample": 2,
        "lora_rank": 4,
        "num_workers": 2,
        "accumulation_steps": 2,
    }
    return TrainConfig.model_validate(
        {**defaults, "learning_rate": 0.01, "checkpoint_every": 2, "log_every": 1, **values}
    )


def batches(config: TrainConfig) -> list[Batch]:
    return [
        group.collate(config.rope, 0, config.data.packing)
        for group in sample_batches(ROWS, config.data, EpochSeed(config.optimizer.seed))
    ]


def mean_gradient(loss: TargetLoss, own_batches: list[Batch]) -> Tensor:
    """Mean gradient over the targets of all workers, as `optimizer_step` computes it."""
    totals = accumulate_gradients(loss, iter(own_batches), len(own_batches))[0].all_reduce()
    gradients = [weight.grad for weight in trainable(loss)]
    parts = [
        grad.full_tensor() if isinstance(grad, DTensor) else sum_over_workers(grad.clone())
        for grad in gradients
        if grad is not None
    ]
    return torch.cat([part.flatten() for part in parts]) / totals.targets


def with_nonzero_lora(model: nn.Module) -> nn.Module:
    """Fill the B matrices: while they are zero, as in a new adapter, half of the gradients are zero."""
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(weight, 0.05)
    return model


def check_gradients(config: TrainConfig) -> None:
    """Compare the gradient of batches of unequal size on several workers with that of one forward pass.

    The samples of the batches are packed into rows in some cases; those of the one forward pass never are.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    chosen = batches(config)[: 2 * workers - 1]  # the last worker has one batch less
    samples = [
        sample
        for group in islice(sample_batches(ROWS, config.data, EpochSeed(config.optimizer.seed)), len(chosen))
        for sample in group.samples
    ]
    whole = fresh_model(config.replace(sharding="none"))
    loss = TargetLoss(with_nonzero_lora(whole), config.rope.visibility)
    single, _ = accumulate_gradients(loss, iter([make_batch(samples, config.rope, 0)]), 1)
    expected = (
        torch.cat([weight.grad.flatten() for weight in trainable(loss) if weight.grad is not None])
        / single.targets
    )
    distributed = TargetLoss(with_nonzero_lora(fresh_model(config)), config.rope.visibility)
    if config.workers.sharding == "full":
        shard(distributed, torch.device("cpu"))
    actual = mean_gradient(distributed, chosen[rank::workers])
    error = float((actual - expected).norm() / expected.norm())
    assert error <= 1e-5, error


class LossRecorder:
    """Hooks that record losses, and ask to stop at poll `stop_at`."""

    def __init__(self, stop_at: int | None) -> None:
        self.num_polls, self.stop_at, self.losses = 0, stop_at, dict[int, float]()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "loss" in metrics:
            self.losses[step] = metrics["loss"]

    def print_line(self, line: str) -> None: ...

    def report(self, metrics: Mapping[str, float], step: int) -> None: ...

    def should_stop(self) -> bool:
        self.num_polls += 1
        return self.num_polls == self.stop_at


def run(
    config: TrainConfig, folder: Path, stop_at: int | None = None
) -> tuple[dict[int, float], dict[str, Tensor]]:
    rank, workers = dist.get_rank(), dist.get_world_size()
    model, hooks = fresh_model(config), LossRecorder(stop_at)
    writer: CheckpointWriter | None = None
    newest = [None]
    if rank == 0:
        writer = manager = CheckpointManager(RemotePath(folder), 2)
        newest = [manager.resume(config.fingerprint(), print)]
    elif config.workers.sharding == "full":
        writer = CheckpointWriter(RemotePath(folder))
    dist.broadcast_object_list(newest)

    def stream(epoch: int, first: int) -> Iterator[Batch]:
        assignment = ShardAssignment("", epoch, first, workers, config.batches_per_step)
        for number, batch in enumerate(batches(config)):
            if number >= first and assignment.worker_of(number) == rank:
                yield batch

    held_out = {1: batches(config)[rank :: workers + 1]}  # workers may have unequal numbers of batches
    train(TrainingInputs(config, config.fingerprint(), model, stream, hooks, 8, held_out, writer), newest[0])
    gathered = folder / "gathered"
    gathered.mkdir(exist_ok=True)
    weights = full_weights(model, gathered)
    if writer:
        writer.close()
    dist.barrier()
    return hooks.losses, weights


def check_resume(config: TrainConfig, folder: Path) -> None:
    """A resumed run equals an undisturbed one bit for bit; a sharded run is close to an unsharded one.

    A run that goes on from a checkpoint of the other kind is close to both.
    """
    losses, weights = run(config, folder / "whole")
    first, _ = run(config, folder / "cut", stop_at=2)
    resumed, actual = run(config, folder / "cut")
    assert first | resumed == losses
    assert all(torch.equal(actual[name], value) for name, value in weights.items())
    if dist.get_rank() == 0:
        save_file(actual, folder / "trained.safetensors")
    if config.workers.sharding == "full":
        _, unsharded = run(config.replace(sharding="none"), folder / "plain")
        run(config, folder / "unsharded", stop_at=2)
        _, unsharded_later = run(config.replace(sharding="none"), folder / "unsharded")
        run(config.replace(sharding="none"), folder / "sharded", stop_at=2)
        _, sharded_later = run(config, folder / "sharded")
        for name, value in actual.items():
            for other in (unsharded, unsharded_later, sharded_later):
                # Adam turns the rounding of a gradient near zero into a part of a learning rate.
                error = float((value - other[name]).norm() / other[name].norm())
                assert error <= 1e-3, (name, error)


def check_precision(config: TrainConfig) -> None:
    """With sharding, layers are gathered in bfloat16, and gradients are summed and kept in float32.

    The error against float32 is that of autocast alone: the sum that runs through the layers is float32 in a
    model whose weights are, because the embedding is not gathered, and so not rounded.
    """
    batch = batches(config)[0]
    exact, plain, sharded = (
        TargetLoss(
            with_nonzero_lora(fresh_model(config.replace(dtype=dtype, sharding=sharding))),
            config.rope.visibility,
            getattr(torch, dtype),
        )
        for dtype, sharding in (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "full"))
    )
    shard(sharded, torch.device("cpu"))
    seen = set[torch.dtype]()
    layer = [module for module in sharded.modules() if isinstance(module, FSDPModule)][-1]
    layer.register_forward_pre_hook(lambda module, _: seen.update(part.dtype for part in module.parameters()))
    gradients = [mean_gradient(loss, [batch]) for loss in (exact, plain, sharded)]
    assert seen == {torch.bfloat16}
    assert {weight.grad.dtype for weight in trainable(sharded) if weight.grad is not None} == {torch.float32}
    plain_error, sharded_error = (float((each - gradients[0]).norm()) for each in gradients[1:])
    assert sharded_error <= 1.1 * plain_error, (sharded_error, plain_error)


@contextmanager
def group_of(workers: int, file: Path) -> Iterator[bool]:
    """A process group of the first `workers` processes; whether this one is among them."""
    rank = int(os.environ["RANK"])
    if rank < workers:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=workers)
    yield rank < workers
    if rank < workers:
        dist.destroy_process_group()


def check_worker_counts(base: str, folder: Path) -> None:
    """Any number of workers computes the same gradients and losses, also where it changes during a run.

    Three workers do not divide the four batches of a step, as after the loss of one of four workers.
    """
    config = settings(
        base_model=base, global_batch_size=12, num_workers=4, accumulation_steps=None, lora_dropout=0.1
    )
    results = dict[str, tuple[Tensor, dict[int, float]]]()
    for name, counts in {"1": [1], "2": [2], "3": [3], "4": [4], "4 to 1": [4, 1], "2 to 4": [2, 4]}.items():
        losses: dict[int, float] = {}
        for turn, workers in enumerate(counts):
            with group_of(workers, folder / f"{name}-{turn}") as is_member:
                if is_member:
                    stop_at = 2 if turn + 1 < len(counts) else None
                    losses |= run(config, folder / f"run-{name}", stop_at)[0]
                    results[name] = first_gradient(config), losses
    gradient, losses = results["1"] if "1" in results else results["4"]
    assert len(losses) >= 3
    for other_gradient, other_losses in results.values():
        assert float((other_gradient - gradient).norm() / gradient.norm()) <= 1e-5
        assert all(math.isclose(losses[step], other_losses[step], rel_tol=1e-4) for step in other_losses)


def first_gradient(config: TrainConfig) -> Tensor:
    """The gradient of the first step, which this process computes with the others of its group."""
    loss = TargetLoss(
        with_nonzero_lora(fresh_model(config.replace(lora_dropout=0.0))), config.rope.visibility
    )
    chosen = batches(config)[: config.batches_per_step]
    return mean_gradient(loss, chosen[dist.get_rank() :: dist.get_world_size()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, folder = sys.argv[1], Path(sys.argv[2])
    base = folder / "base"
    with group_of(int(os.environ["WORLD_SIZE"]), folder / "start"):
        if dist.get_rank() == 0:
            save_tiny(base)
        dist.barrier()
    if case == "counts":
        check_worker_counts(str(base), folder)
        print("any number of workers agrees", flush=True)
        os._exit(0)
    dist.init_process_group("gloo")
    for sharding in ("none", "full"):
        for tuning in ("lora", "full"):
            config = settings(
                base_model=str(base),
                sharding=sharding,
                tuning=tuning,
                lora_dropout=0.0 if sharding == "full" else 0.1,
                packing=tuning == "full",
            )
            if case == "gradients":
                check_gradients(config.replace(lora_dropout=0.0))
                if sharding == "full":
                    check_precision(config)
            else:
                check_resume(config, folder / f"{sharding}-{tuning}")
            print(f"{sharding} {tuning} agrees", flush=True)
    # The mesh keeps Gloo's threads alive; one that frees a tensor while Python ends would abort the process.
    os._exit(0)
