"""Where an adapter is: its folder, that of its run, or the newest of several runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parallelmind.adapter_location import locate_adapter
from parallelmind.config import OptimizerConfig
from parallelmind.errors import UserError
from parallelmind.model.manifest import MANIFEST, fetch_adapter, read_adapter


def finished_run(folder: Path, saved_at: float) -> Path:
    """The adapter of a finished run."""
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    for name in ("adapter_config.json", "parallelmind.json"):
        (adapter / name).write_text("{}")
    os.utime(adapter / "adapter_config.json", (saved_at, saved_at))
    return adapter


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two finished runs and a later one that has not finished."""
    finished_run(tmp_path / "runs" / "demo-1", 200)
    finished_run(tmp_path / "runs" / "demo-2", 100)
    (tmp_path / "runs" / "demo-3" / "checkpoints").mkdir(parents=True)
    return tmp_path / "runs"


def test_a_run_folder_means_its_adapter(runs: Path) -> None:
    adapter = runs / "demo-1" / "adapter"
    for path in (runs / "demo-1", adapter):
        assert locate_adapter(str(path)) == str(adapter)
        assert fetch_adapter(path) == adapter
    assert OptimizerConfig(resume_adapter=str(runs / "demo-2")).resume_adapter == str(
        runs / "demo-2" / "adapter"
    )


def test_a_pattern_means_the_newest_finished_run(runs: Path) -> None:
    assert locate_adapter(f"{runs}/demo-*") == str(runs / "demo-1" / "adapter")
    assert locate_adapter(f"{runs}/demo-*/adapter") == str(runs / "demo-1" / "adapter")
    (runs / "odd-[2]").mkdir()
    assert locate_adapter(f"{runs}/odd-[2]") == f"{runs}/odd-[2]"


@pytest.mark.parametrize("path", ["models:/demo@champion", "s3://bucket/runs/demo-*", "nowhere", "no-*"])
def test_other_paths_stay(path: str) -> None:
    assert locate_adapter(path) == path


def test_a_run_that_is_not_finished_is_named(runs: Path) -> None:
    with pytest.raises(UserError, match=r"^lora_path=.*demo-3: its run is not finished; repeat the command"):
        read_adapter(runs / "demo-3")
    with pytest.raises(UserError, match=r"^lora_path=.*other-\*: no such folder"):
        read_adapter(f"{runs}/other-*")


def test_a_run_at_a_uri_means_its_adapter(runs: Path) -> None:
    folder = fetch_adapter(f"file://{runs}/demo-1")
    assert folder.name == "adapter"
    assert (folder / "parallelmind.json").is_file()


def test_a_run_with_a_whole_model_names_it(tmp_path: Path) -> None:
    for name in ("checkpoints", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"holds a whole model; give .*/model$"):
        read_adapter(tmp_path)
