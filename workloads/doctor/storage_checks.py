"""Checks `output_dir`: from the driver, and from every node of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from workloads.doctor.check import CheckResult, count
from workloads.doctor.config import DoctorConfig
from workloads.doctor.ray_check import live_nodes
from workloads.doctor.storage_probe import (
    probe_from_node,
    probe_node_file,
    probe_uri,
    temporary_subdir,
    write_driver_file,
    write_read_rename,
)

Folder = TypeVar("Folder", Path, RemotePath)

_NODE_TIMEOUT_S = 60.0


def check_storage(config: DoctorConfig) -> CheckResult:
    """Whether the driver can use `output_dir`. Raises UserError for a URI that cannot be used."""
    try:
        with temporary_subdir(config.local_dir) as folder:
            if config.output_path.uri is not None:
                if problem := probe_uri("here", config.output_path.child(folder.name)):
                    raise UserError(problem)
                return CheckResult("ok", f"wrote, read and deleted a file at {config.output_dir}")
            write_read_rename(folder, "here")
    except OSError as error:
        message = f"output_dir={config.local_dir}: cannot be used ({error.strerror or error})"
        return CheckResult("FAIL", message, "choose a folder that this user may write to")
    return CheckResult("ok", f"wrote, read, renamed and removed a folder in {config.local_dir}")


def check_nodes(config: DoctorConfig) -> CheckResult:
    """Whether every node of the cluster can use the same `output_dir`."""
    is_uri = config.output_path.uri is not None
    with temporary_subdir(config.local_dir) as folder:
        if is_uri:
            results = _run_on_every_node(probe_uri, config.output_path.child(folder.name))
            problems = [f"{name}: {problem}" for name, problem in results.values() if problem]
        else:
            write_driver_file(folder)
            results = _run_on_every_node(probe_from_node, folder)
            problems = [
                f"{name} {problem}"
                for node, (name, node_problem) in results.items()
                if (problem := node_problem or probe_node_file(node, folder))
            ]
    if problems and is_uri:
        remedy = "give every node the address and the credentials of the storage"
        return CheckResult("FAIL", ", ".join(problems), remedy)
    if problems:
        remedy = (
            "mount one storage at that path on all nodes, "
            "and give them this project (ray job submit --working-dir .)"
        )
        return CheckResult("FAIL", f"output_dir={config.local_dir}: {', '.join(problems)}", remedy)
    target = "the same files" if len(results) > 1 else "it"
    return CheckResult("ok", f"{count(len(results), 'node')} can use {target} from Ray's tasks")


def _run_on_every_node(
    probe: Callable[[str, Folder], str | None], folder: Folder
) -> dict[str, tuple[str, str | None]]:
    """Run the probe as a task on every node; returns each node's name and problem, by node id."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    names = live_nodes()
    task = ray.remote(probe)
    results = {
        node: task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(node, folder)
        for node in names
    }
    ready, _ = ray.wait(list(results.values()), num_returns=len(results), timeout=_NODE_TIMEOUT_S)
    return {node: (names[node], _problem(results[node], ready)) for node in names}


def _problem(result: Any, ready: list[Any]) -> str | None:
    import ray

    if result not in ready:
        return f"runs no task within {_NODE_TIMEOUT_S:g} s"
    try:
        return ray.get(result)
    except ray.exceptions.RayError as error:
        return f"cannot run a task ({str(error).strip().splitlines()[-1]})"
