"""`auto` in use_gpu, num_gpus and dtype, with a patched probe; and words of other programs for them."""

from __future__ import annotations

from typing import Any

import pytest

from parallelmind import hardware
from parallelmind.config import TrainConfig, resolve
from parallelmind.errors import UserError
from serving.config import AppConfig
from serving.runtime import replica_resources
from workloads.common import cluster, resources
from workloads.common.devices import Gpus, decide_training
from workloads.common.inference_config import InferenceModelConfig
from workloads.evaluate.answers import AnswersConfig
from workloads.generate.config import GenerateConfig
from workloads.sweep.command import sweep_dir_of
from workloads.sweep.config import SweepConfig
from workloads.train.run_dir import RunDir


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"data_path": "a.jsonl", **fields})


@pytest.fixture
def this_machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the GPUs of this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def set_gpus(count: int, native: bool = True) -> None:
        monkeypatch.setattr(hardware, "num_gpus", lambda: count)
        monkeypatch.setattr(hardware, "has_native_bfloat16", lambda: count > 0 and native)

    return set_gpus


@pytest.mark.parametrize(
    ("gpus", "native", "fields", "expected"),
    [
        (0, True, {}, (False, "float32")),
        (1, True, {}, (True, "bfloat16")),
        (1, False, {}, (True, "float32")),
        (1, True, {"dtype": "float32"}, (True, "float32")),
        (1, True, {"use_gpu": False}, (False, "float32")),
        (1, True, {"num_workers": 2}, (False, "float32")),
        (2, True, {"num_workers": 2}, (True, "bfloat16")),
        (0, True, {"dtype": "bfloat16"}, (False, "bfloat16")),
    ],
)
def test_training_takes_the_gpus_of_this_machine(
    this_machine: Any, gpus: int, native: bool, fields: dict[str, Any], expected: tuple[bool, str]
) -> None:
    this_machine(gpus, native)
    decided = decide_training(config(**fields))
    assert (decided.workers.use_gpu, decided.model.dtype) == expected


def test_training_takes_the_gpus_of_a_cluster(this_machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(0)  # of the head
    joined: list[tuple[str | None, bool]] = []
    node = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
    monkeypatch.setattr(cluster, "connect", lambda *arguments: joined.append(arguments))
    monkeypatch.setattr(resources.ray, "nodes", lambda: [{"Alive": True, "Resources": node}])
    monkeypatch.delenv("PARALLELMIND_GROWS_TO", raising=False)
    decided = decide_training(config(ray_address="10.0.0.1:6379"))
    assert (decided.workers.use_gpu, decided.model.dtype) == (True, "bfloat16")
    monkeypatch.setenv("PARALLELMIND_GROWS_TO", "4xCPU=8,GPU=1,accelerator_type:T4=1+8xCPU=8")
    decided = decide_training(config(ray_address="10.0.0.1:6379", num_workers=4), forward_output=False)
    assert (decided.workers.use_gpu, decided.model.dtype) == (True, "float32")
    assert joined == [("10.0.0.1:6379", True), ("10.0.0.1:6379", False)]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, ""),
        ({"use_gpu": False}, "note: 1 GPU(s) stay unused: use_gpu=false\n"),
        (
            {"num_workers": 2},
            "note: 1 GPU(s) stay unused: num_workers=2 needs as many GPUs, and there are 1\n",
        ),
    ],
)
def test_a_gpu_that_stays_unused_is_said(
    this_machine: Any, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], line: str
) -> None:
    this_machine(1)
    decide_training(config(**fields))
    assert capsys.readouterr().err == line


def test_a_gpu_that_is_required_and_missing_is_an_error(this_machine: Any) -> None:
    this_machine(1)
    with pytest.raises(UserError, match="use_gpu=true: num_workers=2 needs as many GPUs, and there are 1"):
        decide_training(config(use_gpu=True, num_workers=2))
    with pytest.raises(UserError, match="use_gpu=true: there is no GPU; set use_gpu=auto"):
        Gpus(0, False).decide(True, "auto")


def test_a_run_without_a_gpu_keeps_its_identity(this_machine: Any) -> None:
    """`auto` is decided before the hash: without a GPU the folder is that of version 0.1.0."""
    this_machine(0)
    decided = decide_training(config())
    assert RunDir.of(decided) == RunDir.of(config(dtype="float32", use_gpu=False))
    this_machine(1)
    assert RunDir.of(decide_training(config())) != RunDir.of(decided)
    sweep = SweepConfig(train=decided, space={"lora_rank": [1]}, metrics=["loss"])
    assert sweep_dir_of(sweep.replace(train=decided.replace(use_gpu=True))) == sweep_dir_of(sweep)


def test_decoding_takes_the_gpu(this_machine: Any) -> None:
    this_machine(1)
    decided = InferenceModelConfig().decided(Gpus.of_this_machine())
    assert decided.use_gpu is True
    assert decided.load_kwargs() == {"dtype": "bfloat16", "trust_remote_code": False}
    this_machine(0)
    assert InferenceModelConfig().decided(Gpus.of_this_machine()).load_kwargs()["dtype"] == "float32"


@pytest.mark.parametrize(
    ("cpus", "gpus", "fields", "expected"),
    [
        (2, 0, {}, (1.8, 0)),
        (2, 0, {"max_replicas": 4}, (0.4, 0)),
        (8, 1, {}, (7.8, 1)),
        (8, 1, {"max_replicas": 4}, (1.8, 0.25)),
        (8, 4, {"max_replicas": 6}, (0.8, 0.5)),
        (8, 1, {"num_gpus": 0}, (7.8, 0)),
        (8, 1, {"num_cpus": 2}, (2, 1)),
    ],
)
def test_an_engine_takes_its_share_of_this_machine(
    this_machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    cpus: int,
    gpus: int,
    fields: dict[str, Any],
    expected: tuple[float, float],
) -> None:
    this_machine(gpus)
    monkeypatch.setattr(hardware, "available_cpus", lambda: cpus)
    monkeypatch.setattr(replica_resources.ray, "is_initialized", lambda: False)
    replicas = replica_resources.decide_resources(AppConfig.of({"base_model": "any", **fields})).replicas
    assert (replicas.num_cpus, replicas.num_gpus) == expected


@pytest.mark.parametrize("num_fronts", [1, 2, 3, 6, 50])
@pytest.mark.parametrize(("cpus", "max_replicas"), [(1, 1), (1, 4), (2, 1), (2, 3), (8, 8)])
def test_engines_leave_room_for_an_update_of_all_ingress_processes(
    this_machine: Any, monkeypatch: pytest.MonkeyPatch, cpus: int, max_replicas: int, num_fronts: int
) -> None:
    this_machine(0)
    monkeypatch.setattr(hardware, "available_cpus", lambda: cpus)
    monkeypatch.setattr(replica_resources.ray, "is_initialized", lambda: False)
    fields = {"base_model": "any", "max_replicas": max_replicas}
    engine = float(replica_resources.decide_resources(AppConfig.of(fields)).replicas.num_cpus)
    ingress = replica_resources.ingress_cpus(num_fronts)
    assert max_replicas * engine + 2 * num_fronts * ingress <= cpus + 1e-9


@pytest.mark.parametrize(
    ("kind", "given", "field"),
    [
        (TrainConfig, "device=cuda", "use_gpu"),
        (TrainConfig, "num_gpus=1", "use_gpu"),
        (InferenceModelConfig, "device=cpu", "use_gpu"),
        (AppConfig, "device=cuda", "num_gpus"),
        (TrainConfig, "gpus=1", "use_gpu"),
        (SweepConfig, "device=cuda", "train.use_gpu"),
        (SweepConfig, "train.device=cuda", "train.use_gpu"),
        (GenerateConfig, "device=cuda", "use_gpu"),
        (AnswersConfig, "device=cuda:0", "use_gpu"),
    ],
)
def test_words_of_other_programs_lead_to_the_field(kind: Any, given: str, field: str) -> None:
    name = given.partition("=")[0]
    with pytest.raises(UserError, match=rf"{name}: unknown field \(did you mean {field}\?\)"):
        resolve(kind, {"data_path": "a"}, [given])


def test_a_wrong_value_is_answered_with_the_right_ones() -> None:
    with pytest.raises(UserError, match="use_gpu=perhaps: should be True, False or 'auto'"):
        resolve(TrainConfig, {"data_path": "a"}, ["use_gpu=perhaps"])
    with pytest.raises(UserError, match="dtype=half: should be 'float32', 'bfloat16', 'float16' or 'auto'"):
        resolve(TrainConfig, {"data_path": "a"}, ["dtype=half"])
    with pytest.raises(UserError, match="num_gpus=many: should be"):
        AppConfig.of({"base_model": "any", "num_gpus": "many"})
