"""What `python -m workloads.doctor` looks at beyond this process: Ray, storage, MLflow, and a whole small
run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from workloads.doctor.local_checks import CheckResult, DoctorConfig, joined_address
from workloads.doctor.storage_checks import exercise, mark, round_trip, scratch, seen_from, seen_here

Place = TypeVar("Place", Path, RemotePath)

_NODE_S = 60.0
_STEPS, _BRANCHES = 3, 2
_EXPERIMENT: str = TrainConfig.flat_fields()["mlflow_experiment"].default


def ray_cluster(config: DoctorConfig) -> CheckResult:
    """Start or join Ray. Raises UserError where that is not possible."""
    address = joined_address(config)
    from workloads.common import cluster  # before Ray, which reads its settings

    # isort: split
    import ray

    cluster.connect(config.ray_address, forward_output=False)
    found, nodes = ray.cluster_resources(), len(_nodes())
    cpus, gpus = found.get("CPU", 0), found.get("GPU", 0)
    if config.use_gpu and not gpus:
        raise UserError("use_gpu=true: the cluster has no GPU; add a node with one, or set use_gpu=false")
    token = os.environ.get("RAY_AUTH_MODE") == "token"
    size = f"{_count(nodes, 'node')}, {_count(cpus, 'CPU')}, {_count(gpus, 'GPU')}"
    whose = f"joined {address}, of the same version" if address else "started one here"
    said = f"Ray {ray.__version__}, {whose}: {size}, token auth {'on' if token else 'off'}"
    if address and not token:
        remedy = "start it with RAY_AUTH_MODE=token, unless nobody else can reach its ports: who does runs code there"
        return CheckResult("ray", "warn", said, remedy)
    return CheckResult("ray", "ok", said)


def storage(config: DoctorConfig) -> CheckResult:
    """Whether the driver can use `output_dir`."""
    try:
        with scratch(config.folder) as place:
            if config.place.uri is not None:
                return _stored_at_a_uri(config, place.name)
            exercise(place, "here")
    except OSError as error:
        said = f"output_dir={config.folder}: cannot be used ({error.strerror or error})"
        return CheckResult("storage", "FAIL", said, "choose a folder that this user may write to")
    return CheckResult("storage", "ok", f"a folder was written, read, renamed and removed in {config.folder}")


def _stored_at_a_uri(config: DoctorConfig, name: str) -> CheckResult:
    if wrong := round_trip("here", config.place.child(name)):
        raise UserError(wrong)
    return CheckResult("storage", "ok", f"a file was written, read and removed at {config.output_dir}")


def nodes(config: DoctorConfig) -> CheckResult:
    """Whether every node of the cluster can use the same `output_dir`."""
    with scratch(config.folder) as place:
        if config.place.uri is not None:
            told = _on_every_node(round_trip, config.place.child(place.name))
            wrong = [f"{name}: {said}" for name, said in told.values() if said]
        else:
            mark(place)
            told = _on_every_node(seen_from, place)
            wrong = [
                f"{name} {reason}"
                for node, (name, said) in told.items()
                if (reason := said or seen_here(node, place))
            ]
    if wrong and config.place.uri is not None:
        return CheckResult(
            "nodes",
            "FAIL",
            ", ".join(wrong),
            "give every node the address and the credentials of the storage",
        )
    if wrong:
        remedy = "mount one storage at that path on all nodes, and give them this project (ray job submit --working-dir .)"
        return CheckResult("nodes", "FAIL", f"output_dir={config.folder}: {', '.join(wrong)}", remedy)
    many = len(told) > 1
    return CheckResult(
        "nodes",
        "ok",
        f"{_count(len(told), 'node')} can use {'the same files' if many else 'it'} from Ray's tasks",
    )


def _nodes() -> dict[str, str]:
    """Id and name of every node that is up."""
    import ray

    return {
        node["NodeID"]: f"node {node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        for node in ray.nodes()
        if node["Alive"]
    }


def _on_every_node(
    ask: Callable[[str, Place], str | None], place: Place
) -> dict[str, tuple[str, str | None]]:
    """By the node's id: its name, and what is wrong according to a task there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found = _nodes()
    task = ray.remote(ask)
    asked = {
        node: task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(node, place)
        for node in found
    }
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_NODE_S)
    return {node: (found[node], _answer(asked[node], ready)) for node in found}


def _answer(asked: Any, ready: list[Any]) -> str | None:
    import ray

    if asked not in ready:
        return f"runs no task within {_NODE_S:g} s"
    try:
        return ray.get(asked)
    except ray.exceptions.RayError as error:
        return f"cannot run a task ({str(error).strip().splitlines()[-1]})"


def mlflow(config: DoctorConfig) -> CheckResult:
    """Whether a run can be tracked. Raises UserError where it cannot."""
    from parallelmind.tracking import absolute_uri, check_store, sqlite_file

    uri = absolute_uri(config.mlflow_uri)
    file = sqlite_file(uri)
    if file is None or file.exists():
        gone = check_store(uri, _EXPERIMENT)
        left = "removed" if gone else "deleted (it is in the server's bin until `mlflow gc`)"
        return CheckResult("mlflow", "ok", f"a run was begun, logged to and {left} in {uri}")
    try:
        with scratch(file.parent) as place:
            check_store(f"sqlite:///{place / file.name}", _EXPERIMENT)
    except OSError as error:
        raise UserError(
            f"mlflow_uri={uri}: cannot be made ({error.strerror}); choose a folder to write to"
        ) from error
    return CheckResult(
        "mlflow", "ok", f"{uri} is not there yet; a database beside it held a run, and is gone"
    )


def end_to_end(config: DoctorConfig) -> CheckResult:
    """Train and decode as a user does. Raises UserError for what the user can mend."""
    if not config.end_to_end:
        return CheckResult("end to end", "skip", "end_to_end=false")
    started = time.monotonic()
    with scratch(config.folder) as place, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        run = config.place.child(place.name)
        try:
            texts = _train_and_decode(config, run)
        finally:
            run.delete_remote()
    took = f"{time.monotonic() - started:.0f} s"
    said = f"{_STEPS} steps of training, then {len(texts)} branches decoded with the adapter, in {took}"
    return CheckResult("end to end", "ok", said)


def _train_and_decode(config: DoctorConfig, place: RemotePath) -> list[str]:
    import parallelmind as pm
    from parallelmind.evaluation.facts import facts_records, write_facts
    from workloads.train.command import ADAPTER, run_training

    data = place.child("train.jsonl")
    write_facts(data.local, _STEPS, seed=1, branches=_BRANCHES)
    data.upload()
    run = TrainConfig(
        name="doctor",
        base_model=config.base_model,
        data_path=str(data),
        output_dir=str(place),
        mlflow_uri=f"sqlite:///{place.local}/mlflow.db",
        ray_address=config.ray_address,
        use_gpu=config.use_gpu,
        batch_size=1,
        lora_rank=4,
    )
    trained = run_training(run).child(ADAPTER)
    model, tokenizer = pm.load_model_with_lora(base_model=config.base_model, lora_path=str(trained))
    (asked,) = facts_records(1, seed=2, branches=_BRANCHES)
    sample = pm.Sample(asked["main"], [branch["prompt"] for branch in asked["branches"]])
    return pm.generate(model, tokenizer, sample, max_new_tokens=4)


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
