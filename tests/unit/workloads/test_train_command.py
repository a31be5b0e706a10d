"""What the training command refuses before anything starts, and what it leaves in MLflow."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest
import ray
import ray.train

from parallelmind.config import TrainConfig
from parallelmind.config.yaml_file import save_yaml
from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from parallelmind.tracking import Tracker
from workloads.train import command as train
from workloads.train import driver as train_driver
from workloads.train import fit as train_fit
from workloads.train import provenance as record
from workloads.train.provenance import code_version, keep_losses


@pytest.fixture
def begun(tmp_path: Path) -> TrainConfig:
    """The settings of a run that was interrupted after its first checkpoint."""
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n')
    config = TrainConfig(
        name="mine", data_path=str(tmp_path / "data.jsonl"), output_dir=str(tmp_path / "runs")
    )
    folder = train.run_place(config).local
    (folder / "checkpoints" / "step-100").mkdir(parents=True)
    save_yaml(config, folder / "config.yaml")
    return config


def changed(config: TrainConfig, **values: object) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), **values})


def test_other_settings_are_refused_by_name(begun: TrainConfig) -> None:
    with pytest.raises(
        UserError, match=r"name=mine: .* has lora_rank=16 \(now 8\), learning_rate=0.0002 \(now 0.1\); "
    ) as caught:
        train.run_training(changed(begun, lora_rank=8, learning_rate=0.1, log_every=1))
    assert "log_every" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"num_workers": 4, "min_workers": 2}, {"sharding": "full"}, {"keep_checkpoints": 9}]
)
def test_where_and_how_it_is_told_may_change(begun: TrainConfig, values: dict[str, object]) -> None:
    assert train.run_place(changed(begun, **values)) == train.run_place(begun)


@pytest.mark.parametrize("values", [{"name": "other"}, {"name": "mine-2"}])
def test_another_name_is_another_run(
    begun: TrainConfig, values: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(begun, lora_rank=8, **values)
    train._refuse_changed(config)


def test_a_finished_run_refuses_nothing(begun: TrainConfig) -> None:
    adapter = train.run_place(begun).local / train.ADAPTER
    adapter.mkdir()
    (adapter / "parallelmind.json").write_text("{}")
    config = changed(begun, lora_rank=8)
    train._refuse_changed(config)


def test_other_records_under_the_same_path_are_refused(begun: TrainConfig, tmp_path: Path) -> None:
    config = changed(begun, mlflow_uri=f"sqlite:///{tmp_path}/mlflow.db")
    place = train.run_place(config)
    first = train_driver._tracker(config, place, "aaa")
    with pytest.raises(UserError, match="data_path=.*its records are not those"):
        train_driver._tracker(config, place, "bbb")
    (place.local / "checkpoints" / "step-100").rmdir()  # nothing was trained on them yet
    assert train_driver._tracker(config, place, "bbb").run_id == first.run_id


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_workers": 2}, "min_workers=2: exceeds num_workers=1"),
        (
            {"validation_branches": [4, 0, -3]},
            "validation_branches=0: a sample has at least one branch; give counts",
        ),
        ({"quantize": "4bit", "tuning": "full"}, "quantize=4bit"),
        ({"quantize": "4bit", "sharding": "full"}, "quantize=4bit"),
        ({"quantize": "4bit", "lora_init": "pissa"}, "lora_init=pissa"),
        ({"quantize": "8bit", "use_dora": True}, "use_dora=true"),
        ({"tuning": "full", "resume_adapter": "x"}, "tuning=full: trains no adapter"),
    ],
)
def test_settings_that_contradict_each_other(
    begun: TrainConfig, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        changed(begun, **values)


def test_a_run_in_a_folder_that_cannot_be_written_is_one_line(begun: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"^output_dir=.*/file: cannot be written \(Not a directory\); make room, or give"
    ):
        train.run_training(changed(begun, output_dir=str(tmp_path / "file")))


def test_a_disk_that_fills_up_on_the_way_is_one_line(begun: TrainConfig) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "loss.png")
    place, output_dir = train.run_place(begun), begun.run.output_dir
    with (
        pytest.raises(
            UserError,
            match=rf"^output_dir={output_dir}: cannot be written \(No space left on device\); make room",
        ),
        train.alone_at(place, begun.run.name, output_dir),
    ):
        train_fit._end_if_final(failed(ray.exceptions.RayActorError(error_msg="The actor died."), full), 1)
    with (
        pytest.raises(ConnectionError),
        train.alone_at(place, begun.run.name, output_dir),
    ):  # of something else
        raise ConnectionError


def failed(*causes: Exception) -> ray.train.WorkerGroupError:
    return ray.train.WorkerGroupError("workers failed", dict(enumerate(causes)))


def test_what_was_lost_is_replaced_and_what_is_wrong_is_told() -> None:
    gone = ray.exceptions.RayActorError(error_msg="The actor died.")
    for times in range(1, 4):
        train_fit._end_if_final(failed(gone), times)
        train_fit._end_if_final(gone, times)
    with pytest.raises(UserError, match="lost 4 times without a new checkpoint .*lower batch_size") as caught:
        train_fit._end_if_final(failed(gone), 4)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match="lora_targets"
    ):  # the other worker was only lost because this one ended
        train_fit._end_if_final(failed(gone, UserError("lora_targets: no such layer")), 1)
    with pytest.raises(ray.train.WorkerGroupError):
        train_fit._end_if_final(failed(ZeroDivisionError()), 1)


def told_by_ray(cause: Exception) -> ray.train.WorkerGroupError:
    """As the error of the feeder reaches the driver, through the worker that has asked it."""
    try:
        raise ray.exceptions.RayTaskError("Feeder.next()", "Traceback", cause).as_instanceof_cause()
    except ray.exceptions.RayTaskError as error:
        return failed(error)


def test_what_the_feeder_cannot_read_is_told_as_it_is() -> None:
    with pytest.raises(UserError, match="^data_path=a.jsonl: gone$"):
        train_fit._end_if_final(told_by_ray(UserError("data_path=a.jsonl: gone")), 1)
    with pytest.raises(ray.train.WorkerGroupError):  # it would happen again
        train_fit._end_if_final(told_by_ray(ZeroDivisionError()), 1)
    for passing in (ConnectionResetError("reset by peer"), ray.exceptions.OutOfMemoryError("killed")):
        train_fit._end_if_final(told_by_ray(passing), 3)
    with pytest.raises(UserError, match=r"lost 4 times .*\(reset by peer\)"):
        train_fit._end_if_final(told_by_ray(ConnectionResetError("reset by peer")), 4)


def test_a_repository_without_a_commit_only_lacks_that_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(record, "_ROOT", tmp_path)
    assert {"code_sha256", "version.torch"} <= code_version().keys()
    assert "mlflow.source.git.commit" not in code_version()


def test_code_and_losses_are_on_record(tmp_path: Path) -> None:
    tags = code_version()
    assert len(tags["code_sha256"]) == 12
    assert tags == code_version()
    assert "version.torch" in tags
    config = TrainConfig(data_path="data.jsonl")
    tracker = Tracker.start(f"sqlite:///{tmp_path}/mlflow.db", "tests", "one", config, "key")
    for step in range(1, 9):
        tracker.log_metrics(
            {"loss": 3 / step, **({"validation/loss_4": 4 / step} if step % 4 == 0 else {})}, step
        )
    picture = keep_losses(RemotePath(tmp_path), tracker)
    assert picture.local.read_bytes().startswith(b"\x89PNG")
