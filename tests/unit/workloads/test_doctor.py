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
import torch
from doctoring import found, place_of_our_own
from tiny import save_tiny

from parallelmind.errors import UserError
from workloads.doctor import command as doctor
from workloads.doctor import local_checks as doctor_checks
from workloads.doctor.command import Check
from workloads.doctor.local_checks import CheckResult, DoctorConfig


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return place_of_our_own(tmp_path, monkeypatch)


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
    assert (
        found("libraries").line()
        == "FAIL  libraries   Python 3.10.2 is not >=3.11; run make setup PYTHON=/path/to/another"
    )


def test_without_an_installed_project_its_pyproject_toml_here_is_asked(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor_checks, "metadata", missing)
    (place / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert (found("libraries").status, found("libraries").remedy) == (
        "warn",
        "start this in the project's folder",
    )
    asked = (
        'dependencies = ["torch>=2.9", "nothing-of-that-name>=1", "uvloop>=99; sys_platform == \'win32\'"]'
    )
    (place / "pyproject.toml").write_text(
        f'[project]\nname = "parallelmind"\nrequires-python = ">=3.11"\n{asked}\n'
    )
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
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    )
    assert "is not whole (model-1.safetensors is missing)" in found("model", base_model=str(folder)).said


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("./nowhere", "give smollm2-135m, a local folder or org/name"),
        ("nobody/nothing", "run `hf download nobody/nothing`"),
    ],
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
    assert (
        found("gpu", use_gpu=True, ray_address="10.0.0.1:6379").status == "ok"
    )  # one of its nodes may have some


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


def test_what_rests_on_a_failed_check_is_skipped_with_the_reason() -> None:
    def fails(_: DoctorConfig) -> CheckResult:
        raise UserError("field=1: is wrong; set field=2")

    def breaks(_: DoctorConfig) -> CheckResult:
        raise KeyError("x")

    checks = [Check("a", fails), Check("b", breaks), Check("c", fails, ("a", "b")), Check("d", fails, ("c",))]
    lines = [finding.line() for finding in doctor.findings(checks, DoctorConfig())]
    assert lines == [
        "FAIL  a           field=1: is wrong; set field=2",
        "FAIL  b           KeyError: 'x'; not foreseen: please report it",
        "skip  c           needs a and b",
        "skip  d           needs c",
    ]


def test_only_a_failed_check_gives_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for status in ("ok", "warn", "skip", "FAIL"):
        monkeypatch.setattr(
            doctor, "CHECKS", [Check("a", lambda _, status=status: CheckResult("a", status, "so"))]
        )
        if status == "FAIL":
            with pytest.raises(SystemExit, match="1"):
                doctor.main([])
        else:
            doctor.main([])
        assert capsys.readouterr().out == f"{status:4}  a           so\n"


@pytest.mark.parametrize(
    ("given", "message"), [("base_modl=x", "did you mean base_model"), ("use_gpu=perhaps", "use_gpu=")]
)
def test_bad_arguments_are_user_errors(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        doctor.main([given])


def test_without_the_libraries_of_the_command_line_itself_there_is_still_a_remedy(place: Path) -> None:
    (place / "yaml.py").write_text("raise ModuleNotFoundError(name='yaml')")
    done = subprocess.run(
        [sys.executable, "-m", "workloads.doctor"], capture_output=True, text=True, env=_with(place)
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "yaml is missing; run `make setup`" in done.stderr


def _with(place: Path) -> dict[str, str]:
    root = Path(__file__).resolve().parents[3]
    return {"PYTHONPATH": f"{place}:{root / 'platform'}:{root}"}
