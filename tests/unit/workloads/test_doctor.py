"""Messages and remedies of the doctor: libraries, base model, GPU, memory, disk, and the command itself."""

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
import torch
from doctoring import isolated_cwd, run_check
from tiny import save_tiny

from parallelmind import hardware
from parallelmind.errors import UserError
from workloads.doctor import command, library_check, machine_checks
from workloads.doctor.check import Check, CheckResult, run_checks
from workloads.doctor.config import DoctorConfig


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return isolated_cwd(tmp_path, monkeypatch)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that these versions are installed; None means that the library is missing."""

    def version(name: str) -> str:
        pretended = versions.get(name, "")
        if pretended is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return pretended or importlib.metadata.version(name)

    monkeypatch.setattr(library_check, "version", version)


def test_installed_libraries_meet_the_requirements() -> None:
    result = run_check("libraries")
    assert result.status == "ok"
    assert f"torch {torch.__version__}" in result.message


def test_missing_and_old_libraries_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_installed(monkeypatch, peft=None, transformers="4.40.0")
    result = run_check("libraries")
    assert result.status == "FAIL"
    assert re.search(r"peft is missing, transformers 4\.40\.0 is not \S*>=5\.23", result.message)
    assert re.fullmatch(r"run \S+ -m pip install 'peft>=0\.21' 'transformers\S+'", result.remedy)


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_check.platform, "python_version", lambda: "3.10.2")
    assert (
        run_check("libraries").line("libraries")
        == "FAIL  libraries   Python 3.10.2 is not >=3.11; run make setup PYTHON=/path/to/another"
    )


def test_requirements_are_read_from_pyproject_toml_if_the_project_is_not_installed(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(library_check, "metadata", missing)
    (cwd / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert (run_check("libraries").status, run_check("libraries").remedy) == (
        "warn",
        "start this in the project's folder",
    )
    dependencies = (
        'dependencies = ["torch>=2.9", "nothing-of-that-name>=1", "uvloop>=99; sys_platform == \'win32\'"]'
    )
    (cwd / "pyproject.toml").write_text(
        f'[project]\nname = "parallelmind"\nrequires-python = ">=3.11"\n{dependencies}\n'
    )
    result = run_check("libraries")
    assert result.message.endswith(", but nothing-of-that-name is missing")
    assert result.status == "FAIL"


def test_the_remedy_for_the_missing_demo_model_is_make_model() -> None:
    result = run_check("model")
    assert (result.status, result.remedy) == ("FAIL", "run `make model`")
    assert "base_model=smollm2-135m: is not in " in result.message


def test_a_complete_model_is_ok(cwd: Path) -> None:
    result = run_check("model", base_model=save_tiny(cwd / "tiny"))
    assert (result.status, result.remedy) == ("ok", "")


def test_truncated_and_missing_weights_fail(cwd: Path) -> None:
    folder = Path(save_tiny(cwd / "tiny"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    result = run_check("model", base_model=str(folder))
    assert result.status == "FAIL"
    assert "is incomplete (model.safetensors: " in result.message
    assert result.remedy == "save the model there again with save_pretrained"
    (folder / "model.safetensors").unlink()
    assert "is incomplete (it has no model.safetensors)" in run_check("model", base_model=str(folder)).message
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    )
    assert (
        "is incomplete (model-1.safetensors is missing)" in run_check("model", base_model=str(folder)).message
    )


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("./nowhere", "give smollm2-135m, a local folder or org/name"),
        ("nobody/nothing", "run `hf download nobody/nothing`"),
    ],
)
def test_missing_models_fail_with_a_remedy(name: str, remedy: str) -> None:
    result = run_check("model", base_model=name)
    assert (result.status, result.remedy) == ("FAIL", remedy)


def test_a_missing_gpu_fails_only_with_use_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "num_gpus", lambda: 0)
    assert run_check("gpu").status == "ok"
    result = run_check("gpu", use_gpu=True)
    assert result.status == "FAIL"
    assert "use_gpu=true: no GPU on this machine" in result.message
    assert "set use_gpu=false" in result.remedy
    assert (
        run_check("gpu", use_gpu=True, ray_address="10.0.0.1:6379").status == "ok"
    )  # a node of the cluster may have a GPU


def test_a_gpu_that_cannot_compute_warns_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(hardware, "num_gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch, "ones", ones)
    assert run_check("gpu").status == "warn"
    assert run_check("gpu", use_gpu=True).line("gpu") == (
        "FAIL  gpu         GPU 0: cannot compute (no kernel image is available); "
        "install a torch that fits the GPU and its driver"
    )


def test_little_memory_or_disk_space_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    room = namedtuple("room", "total available free")(2**34, 2**30, 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room)
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: room)
    for name in ("memory", "disk"):
        result = run_check(name, output_dir="deep/runs")
        assert (result.status, bool(result.remedy)) == ("warn", True)
        assert "1.0 " in result.message


def test_a_check_that_needs_a_failed_one_is_skipped_with_the_reason() -> None:
    def fails(_: DoctorConfig) -> CheckResult:
        raise UserError("field=1: is wrong; set field=2")

    def breaks(_: DoctorConfig) -> CheckResult:
        raise KeyError("x")

    checks = [Check("a", fails), Check("b", breaks), Check("c", fails, ("a", "b")), Check("d", fails, ("c",))]
    lines = [result.line(name) for name, result in run_checks(checks, DoctorConfig())]
    assert lines == [
        "FAIL  a           field=1: is wrong; set field=2",
        "FAIL  b           KeyError: 'x'; unexpected error: please report it",
        "skip  c           needs a and b",
        "skip  d           needs c",
    ]


def test_only_a_failed_check_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for status in ("ok", "warn", "skip", "FAIL"):
        monkeypatch.setattr(
            command, "CHECKS", [Check("a", lambda _, status=status: CheckResult(status, "so"))]
        )
        if status == "FAIL":
            with pytest.raises(SystemExit, match="1"):
                command.main([])
        else:
            command.main([])
        assert capsys.readouterr().out == f"{status:4}  a           so\n"


@pytest.mark.parametrize(
    ("given", "message"), [("base_modl=x", "did you mean base_model"), ("use_gpu=perhaps", "use_gpu=")]
)
def test_bad_arguments_are_user_errors(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.main([given])


def test_missing_libraries_of_the_command_line_itself_are_reported_in_one_line(cwd: Path) -> None:
    (cwd / "yaml.py").write_text("raise ModuleNotFoundError(name='yaml')")
    done = subprocess.run(
        [sys.executable, "-m", "workloads.doctor"], capture_output=True, text=True, env=environment(cwd)
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "yaml is missing; run `make setup`" in done.stderr


def environment(cwd: Path) -> dict[str, str]:
    root = Path(__file__).resolve().parents[3]
    return {"PYTHONPATH": f"{cwd}:{root / 'platform'}:{root}"}
