"""Clusters: nodes that the autoscaler starts, and threads of processes that Ray starts."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from benchmarks.harness import Bench
from benchmarks.node_packing import Bundle, cluster_config, nodes_started
from parallelmind import cluster_nodes
from parallelmind.config import ServicesConfig
from parallelmind.evaluation.facts import write_facts
from parallelmind.evaluation.tiny_models import tiny_model, tiny_tokenizer
from parallelmind.hardware import available_cpus

_WORKERS, _TRIALS = 8, 12


def _nodes_as_needed() -> float:
    """The smaller ratio of nodes started and needed: of a training run, and of a sweep of one-CPU trials."""
    from workloads.common import resources

    config = cluster_config()
    node_cpus = config["available_node_types"]["data_worker"]["resources"]["CPU"]
    (grows_to,) = re.findall(rf"{cluster_nodes.GROWS_TO}=(\S+)", " ".join(config["docker"]["run_options"]))
    with patch.dict(os.environ, {cluster_nodes.GROWS_TO: grows_to}), patch("ray.nodes", list):
        worker = {"CPU": resources.cpus_per_worker(_WORKERS, use_gpu=False)}
    driver = {"CPU": resources.TRIAL_DRIVER_CPUS}
    trial = {"CPU": resources.cpus_per_trial_worker(1, workers=1)}
    return min(
        _ratio([[worker] * _WORKERS], needed=_WORKERS),  # every worker computes with a node's CPUs
        _ratio([[driver]] * _TRIALS + [[trial]] * _TRIALS, needed=-(-_TRIALS // node_cpus)),
    )


def _ratio(groups: Sequence[Sequence[Bundle]], needed: int) -> float:
    started = sum(nodes_started(groups).values())
    return min(started, needed) / max(started, needed)


def _threads_without_omp() -> float:
    """Share of processes that compute with a thread for each reserved CPU, without $OMP_NUM_THREADS."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    probe = subprocess.run(
        [sys.executable, "-m", "benchmarks.cluster"], env=env, check=True, capture_output=True, text=True
    )
    pairs: list[tuple[float, int]] = json.loads(probe.stdout.splitlines()[-1])
    pairs += [(available_cpus() / workers, _training_threads(workers, env)) for workers in (1, 2)]
    print(f"reserved CPUs and threads: {pairs},", end=" ", file=sys.stderr)
    return sum(threads == max(1, round(cpus)) for cpus, threads in pairs) / len(pairs)


def _training_threads(workers: int, env: Mapping[str, str]) -> int:
    """Threads of each worker of a training run, as it prints them."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model("llama").save_pretrained(folder / "tiny")
        tiny_tokenizer().save_pretrained(folder / "tiny")
        write_facts(str(folder / "train.jsonl"), 16, seed=1)
        fields = {"base_model": "tiny", "data_path": "train.jsonl", "max_steps": 1, "num_workers": workers}
        command = [
            sys.executable,
            "-m",
            "workloads.train",
            *(f"{key}={value}" for key, value in fields.items()),
        ]
        output = subprocess.run(
            command, cwd=folder, env=env, check=True, capture_output=True, text=True
        ).stdout
    return int(re.findall(r"threads of each: (\d+)", output)[0])


def _probe() -> list[tuple[float, int]]:
    """Reserved CPUs and threads of an actor for every kind of process that Ray starts."""
    from workloads.common import cluster, resources  # before Ray

    # isort: split
    import ray
    import torch

    from serving.config import AppConfig
    from serving.runtime.replica_resources import decide_resources

    def threads() -> int:
        resources.use_reserved_cpus()
        return torch.get_num_threads()

    cluster.connect(ServicesConfig().ray_address, forward_output=False)
    logging.disable()
    engines = [AppConfig.of({"base_model": "any", "max_replicas": number}) for number in (1, 2)]
    reserved = [
        *(resources.cpus_per_worker(number, use_gpu=False) for number in (1, 2, 3)),  # train, generate
        *(resources.cpus_per_trial_worker(number, workers=1) for number in (1, 2)),
        *(float(decide_resources(engine).replicas.num_cpus) for engine in engines),
    ]
    return [(cpus, ray.get(ray.remote(num_cpus=cpus)(threads).remote())) for cpus in reserved]


BENCHES = [
    Bench("cluster.nodes_as_needed", 1.0, "higher", "ratio", _nodes_as_needed),
    Bench("cluster.threads_without_omp", 1.0, "higher", "share", _threads_without_omp),
]

if __name__ == "__main__":
    print(json.dumps(_probe()))
