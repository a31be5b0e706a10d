"""What `python -m workloads.doctor` says where something is wrong, and what it says to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from tiny import save_tiny

from parallelmind.errors import UserError
from parallelmind.tracking import MlflowClient, absolute_uri, try_out
from serving.ports import free_port
from workloads import cluster, doctor, doctor_checks, doctor_cluster, doctor_storage
from workloads.doctor import CHECKS, Check
from workloads.doctor_checks import DoctorConfig, Finding


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of our own, and no cluster or cache of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def found(name: str, **fields: Any) -> Finding:
    """What the check of that name finds."""
    (check,) = [each for each in CHECKS if each.name == name]
    (finding,) = doctor.findings([Check(name, check.find)], DoctorConfig(**fields))
    assert "\n" not in finding.line()
    return finding


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that these versions are installed, and that what has none is missing."""

    def version(name: str) -> str:
        given = versions.get(name, "")
        if given is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return given or importlib.metadata.version(name)

    monkeypatch.setattr(doctor_checks, "version", version)


def test_every_library_is_as_asked_for() -> None:
    finding = found("libraries")
    assert finding.status == "ok"
    assert f"torch {torch.__version__}" in finding.said


def test_a_missing_and_an_old_library_are_named_and_can_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, peft=None, transformers="4.40.0")
    finding = found("libraries")
    assert finding.status == "FAIL"
    assert re.search(r"peft is missing, transformers 4\.40\.0 is not \S*>=5\.23", finding.said)
    assert re.fullmatch(r"run \S+ -m pip install 'peft>=0\.21' 'transformers\S+'", finding.remedy)


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks.platform, "python_version", lambda: "3.10.2")
    assert found("libraries").line() == "FAIL  libraries   Python 3.10.2 is not >=3.11; run make setup PYTHON=/path/to/another"


def test_without_an_installed_project_its_pyproject_toml_here_is_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor_checks, "metadata", missing)
    (place / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert (found("libraries").status, found("libraries").remedy) == ("warn", "start this in the project's folder")
    asked = 'dependencies = ["torch>=2.9", "nothing-of-that-name>=1", "uvloop>=99; sys_platform == \'win32\'"]'
    (place / "pyproject.toml").write_text(f'[project]\nname = "parallelmind"\nrequires-python = ">=3.11"\n{asked}\n')
    finding = found("libraries")
    assert finding.said.endswith(", but nothing-of-that-name is missing")
    assert finding.status == "FAIL"


def test_the_demo_model_is_fetched_by_make_model() -> None:
    finding = found("model")
    assert (finding.status, finding.remedy) == ("FAIL", "run `make model`")
    assert "base_model=smollm2-135m: is not in " in finding.said


def test_a_model_that_is_whole(place: Path) -> None:
    finding = found("model", base_model=save_tiny(place / "tiny"))
    assert (finding.status, finding.remedy) == ("ok", "")


def test_weights_that_were_cut_short(place: Path) -> None:
    folder = Path(save_tiny(place / "tiny"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    finding = found("model", base_model=str(folder))
    assert finding.status == "FAIL"
    assert "is not whole (model.safetensors: " in finding.said
    assert finding.remedy == "save the model there again with save_pretrained"
    (folder / "model.safetensors").unlink()
    assert "is not whole (it has no model.safetensors)" in found("model", base_model=str(folder)).said
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "is not whole (model-1.safetensors is missing)" in found("model", base_model=str(folder)).said


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("./nowhere", "give smollm2-135m, a local folder or org/name"), ("nobody/nothing", "run `hf download nobody/nothing`")],
)
def test_models_that_are_not_here(name: str, remedy: str) -> None:
    finding = found("model", base_model=name)
    assert (finding.status, finding.remedy) == ("FAIL", remedy)


def test_no_gpu_is_fine_unless_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found("gpu").status == "ok"
    finding = found("gpu", use_gpu=True)
    assert finding.status == "FAIL"
    assert "use_gpu=true: none here" in finding.said
    assert "set use_gpu=false" in finding.remedy
    assert found("gpu", use_gpu=True, ray_address="10.0.0.1:6379").status == "ok"  # one of its nodes may have some


def test_a_gpu_that_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch, "ones", ones)
    assert found("gpu").status == "warn"
    assert found("gpu", use_gpu=True).line() == (
        "FAIL  gpu         GPU 0: cannot compute (no kernel image is available); "
        "install a torch that fits the GPU and its driver"
    )


def test_little_room_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    room = namedtuple("room", "total available free")(2**34, 2**30, 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room)
    monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda _: room)
    for name in ("memory", "disk"):
        finding = found(name, output_dir="deep/runs")
        assert (finding.status, bool(finding.remedy)) == ("warn", True)
        assert "1.0 " in finding.said


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    finding = found("ray", ray_address=address)
    assert finding.status == "FAIL"
    assert f"ray_address={address}: nothing answers there" in finding.said
    assert "ray start --head" in finding.remedy


def test_a_cluster_of_no_known_shape() -> None:
    finding = found("ray", ray_address="nonsense")
    assert finding.status == "FAIL"
    assert "ray_address=nonsense: " in finding.said


@pytest.mark.parametrize(("address", "remedy"), [(None, "less busy"), ("10.0.0.1:6379", "RAY_AUTH_TOKEN")])
def test_a_cluster_that_cannot_be_used(address: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object, **__: object) -> None:
        raise RuntimeError("Version mismatch:\n    Ray: 2.1")

    monkeypatch.setattr(cluster, "connect", connect)
    monkeypatch.setattr(doctor_cluster, "refuse_unreachable", lambda _: None)
    finding = found("ray", ray_address=address)
    assert finding.status == "FAIL"
    assert "cannot be used (Version mismatch: Ray: 2.1)" in finding.said
    assert remedy in finding.remedy


def test_a_cluster_without_gpus_and_one_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: None)
    monkeypatch.setattr(doctor_cluster, "refuse_unreachable", lambda _: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    node = {"NodeID": "abcdef0123", "NodeManagerAddress": "10.0.0.1"}
    monkeypatch.setattr(ray, "nodes", lambda: [{**node, "Alive": True}, {**node, "Alive": False}])
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    finding = found("ray", use_gpu=True)
    assert (finding.status, finding.said) == ("FAIL", "use_gpu=true: the cluster has no GPU")
    finding = found("ray", ray_address="10.0.0.1:6379")
    assert (finding.status, "RAY_AUTH_MODE=token" in finding.remedy) == ("warn", True)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    finding = found("ray", ray_address="10.0.0.1:6379")
    assert finding.status == "ok"
    assert finding.said.endswith("1 node, 4 CPUs, 0 GPUs, token auth on")


def test_a_folder_that_can_be_used_is_left_as_it_was(place: Path) -> None:
    assert found("storage", output_dir="deep/runs").status == "ok"
    assert list(place.iterdir()) == []
    (place / "runs").mkdir()
    assert found("storage").status == "ok"
    assert list((place / "runs").iterdir()) == []


@pytest.mark.parametrize("folder", ["/proc/nowhere/runs", "file/runs", "file"])
def test_a_folder_that_cannot_be_used(place: Path, folder: str) -> None:
    (place / "file").write_text("")
    finding = found("storage", output_dir=folder)
    assert finding.status == "FAIL"
    assert f"{folder}: cannot be used (" in finding.said
    assert finding.remedy == "choose a folder that this user may write to"


def test_a_node_that_does_not_see_the_same_files_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes: one that shares the folder, one that has an empty one there, and one that has another of the same name."""
    other = place / "other"

    def on_every_node(ask: Any, shared: Path) -> dict[str, tuple[str, str | None]]:
        (other / shared.name).mkdir(parents=True)
        told = {"a": ask("a", shared), "b": ask("b", other / shared.name)}
        doctor_storage.mark(other / shared.name)
        told["c"] = ask("c", other / shared.name)
        return {node: (f"node {node}", said) for node, said in told.items()}

    monkeypatch.setattr(doctor_cluster, "_on_every_node", on_every_node)
    finding = found("nodes")
    assert finding.status == "FAIL"
    assert "node a" not in finding.said
    assert "node b cannot use what the driver wrote there (No such file or directory)" in finding.said
    assert "node c wrote a file that the driver does not see" in finding.said
    assert "mount one storage at that path on all nodes" in finding.remedy


def test_a_database_is_left_as_it_was(place: Path) -> None:
    assert found("mlflow", mlflow_uri="sqlite:///deep/mlflow.db").status == "ok"
    assert list(place.iterdir()) == []
    uri = absolute_uri("sqlite:///mlflow.db")
    assert try_out(uri, "parallelmind")  # makes the database
    assert found("mlflow").status == "ok"
    client = MlflowClient(uri)
    experiments = client.search_experiments()
    assert [each.name for each in experiments] == ["Default"]
    assert client.search_runs([each.experiment_id for each in experiments], run_view_type=3) == []


def test_an_mlflow_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    finding = found("mlflow", mlflow_uri=uri)
    assert finding.status == "FAIL"
    assert re.fullmatch(rf"mlflow_uri={uri}: cannot be used \(.*Connection refused\)", finding.said)
    assert "of a server that runs" in finding.remedy


@pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:////proc/nowhere/x.db", "postgresql+nodriver://x@127.0.0.1/x"])
def test_an_mlflow_store_that_cannot_be_used(uri: str) -> None:
    finding = found("mlflow", mlflow_uri=uri)
    assert (finding.status, finding.said.startswith(f"mlflow_uri={uri}: "), bool(finding.remedy)) == ("FAIL", True, True)


def test_what_rests_on_a_failed_check_is_skipped_with_the_reason() -> None:
    def fails(_: DoctorConfig) -> Finding:
        raise UserError("field=1: is wrong; set field=2")

    def breaks(_: DoctorConfig) -> Finding:
        raise KeyError("x")

    checks = [Check("a", fails), Check("b", breaks), Check("c", fails, ("a", "b")), Check("d", fails, ("c",))]
    lines = [finding.line() for finding in doctor.findings(checks, DoctorConfig())]
    assert lines == [
        "FAIL  a           field=1: is wrong; set field=2",
        "FAIL  b           KeyError: 'x'; not foreseen: please report it",
        "skip  c           needs a and b",
        "skip  d           needs c",
    ]


def test_only_a_failed_check_gives_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for status in ("ok", "warn", "skip", "FAIL"):
        monkeypatch.setattr(doctor, "CHECKS", [Check("a", lambda _, status=status: Finding("a", status, "so"))])
        if status == "FAIL":
            with pytest.raises(SystemExit, match="1"):
                doctor.main([])
        else:
            doctor.main([])
        assert capsys.readouterr().out == f"{status:4}  a           so\n"


@pytest.mark.parametrize(("given", "message"), [("base_modl=x", "did you mean base_model"), ("use_gpu=perhaps", "use_gpu=")])
def test_bad_arguments_are_user_errors(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        doctor.main([given])


def test_without_the_libraries_of_the_command_line_itself_there_is_still_a_remedy(place: Path) -> None:
    (place / "omegaconf.py").write_text("raise ModuleNotFoundError(name='omegaconf')")
    done = subprocess.run([sys.executable, "-m", "workloads.doctor"], capture_output=True, text=True, env=_with(place))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "omegaconf is missing; run `make setup`" in done.stderr


def _with(place: Path) -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return {"PYTHONPATH": f"{place}:{root / 'platform'}:{root}"}
