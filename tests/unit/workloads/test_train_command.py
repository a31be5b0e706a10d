"""What training refuses before it starts, which errors are final, and what it records in MLflow."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train

from parallelmind.config import TrainConfig
from parallelmind.config.yaml_file import save_yaml
from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from parallelmind.training.outcome import Outcome
from workloads.train import fit, provenance
from workloads.train.fit import raise_if_final
from workloads.train.metrics_file import MetricsFile
from workloads.train.prepare import open_tracker
from workloads.train.provenance import code_version, save_loss_plot, source_files
from workloads.train.run import run_training
from workloads.train.run_dir import RunDir, lock_dir
from workloads.train.same_name import check_no_changed_run, find_run_dir
from workloads.train.worker import WorkerTask


@pytest.fixture
def unfinished(tmp_path: Path) -> TrainConfig:
    """The configuration of a run that was interrupted after its first checkpoint."""
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n')
    config = TrainConfig(
        name="mine",
        data_path=str(tmp_path / "data.jsonl"),
        output_dir=str(tmp_path / "runs"),
        dtype="float32",
    )
    folder = RunDir.of(config).path.local
    (folder / "checkpoints" / "step-100").mkdir(parents=True)
    save_yaml(config, folder / "config.yaml")
    return config


def changed(config: TrainConfig, **values: object) -> TrainConfig:
    return config.replace(**values)


def test_other_settings_are_refused_by_name(unfinished: TrainConfig) -> None:
    with pytest.raises(
        UserError, match=r"name=mine: .* has lora_rank=16 \(now 8\), learning_rate=0.0002 \(now 0.1\); "
    ) as error:
        run_training(changed(unfinished, lora_rank=8, learning_rate=0.1, log_every=1))
    assert "log_every" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_field_that_the_unfinished_run_does_not_have_is_at_its_default(unfinished: TrainConfig) -> None:
    """The run was started by a version without the field."""
    file = RunDir.of(unfinished).path.local / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("truncate_side")))
    check_no_changed_run(unfinished, RunDir.of(unfinished))
    config = changed(unfinished, truncate_side="left")
    with pytest.raises(UserError, match=r"has truncate_side=right \(now left\); use its values"):
        check_no_changed_run(config, RunDir.of(config))


@pytest.mark.parametrize(
    "values",
    [
        {"min_workers": 1},
        {"sharding": "full"},
        {"keep_checkpoints": 9},
    ],
)
def test_workers_and_logging_may_change(unfinished: TrainConfig, values: dict[str, object]) -> None:
    assert RunDir.of(changed(unfinished, **values)) == RunDir.of(unfinished)


def test_more_workers_without_a_global_batch_size_are_another_run(unfinished: TrainConfig) -> None:
    config = changed(unfinished, num_workers=2)
    with pytest.raises(UserError, match=r"has global_batch_size=4 \(now 8\); use its values to resume it"):
        check_no_changed_run(config, find_run_dir(config))


def written_by_an_earlier_version(config: TrainConfig) -> Path:
    """Give the folder of the run the name and the config.yaml that an earlier version gave it."""
    folder = RunDir.of_earlier_version(config).path.local
    RunDir.of(config).path.local.rename(folder)
    lines = (folder / "config.yaml").read_text().splitlines(keepends=True)
    (folder / "config.yaml").write_text(
        "".join(line for line in lines if not line.startswith("global_batch_size"))
    )
    return folder


def test_a_run_of_an_earlier_version_goes_on_under_its_hash(unfinished: TrainConfig) -> None:
    earlier = changed(unfinished, accumulation_steps=2)
    RunDir.of(unfinished).path.local.rename(RunDir.of(earlier).path.local)
    save_yaml(earlier, RunDir.of(earlier).config_file.local)
    folder = written_by_an_earlier_version(earlier)
    for config in (earlier, changed(earlier, accumulation_steps=None, global_batch_size=8, log_every=1)):
        run_dir = find_run_dir(config)
        assert (run_dir.path.local, run_dir.config_hash) == (folder, earlier.earlier_fingerprint())
        check_no_changed_run(config, run_dir)
    other = changed(earlier, learning_rate=0.1)
    assert find_run_dir(other) == RunDir.of(other)
    with pytest.raises(UserError, match=r"has learning_rate=0.0002 \(now 0.1\); use its values"):
        check_no_changed_run(other, find_run_dir(other))


def test_a_run_of_an_earlier_version_whose_settings_were_edited_is_not_resumed(
    unfinished: TrainConfig,
) -> None:
    folder = written_by_an_earlier_version(changed(unfinished, accumulation_steps=1))
    edited = changed(unfinished, accumulation_steps=1, learning_rate=0.1)
    save_yaml(edited, folder / "config.yaml")
    assert find_run_dir(edited) == RunDir.of(edited)


@pytest.mark.parametrize("values", [{"name": "other"}, {"name": "mine-2"}])
def test_another_name_is_another_run(
    unfinished: TrainConfig, values: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(unfinished, lora_rank=8, **values)
    check_no_changed_run(config, RunDir.of(config))


def test_a_finished_run_refuses_nothing(unfinished: TrainConfig) -> None:
    adapter = RunDir.of(unfinished).result.local
    adapter.mkdir()
    (adapter / "parallelmind.json").write_text("{}")
    config = changed(unfinished, lora_rank=8)
    check_no_changed_run(config, RunDir.of(config))


def test_other_records_under_the_same_path_are_refused(unfinished: TrainConfig, tmp_path: Path) -> None:
    config = changed(unfinished, mlflow_uri=f"sqlite:///{tmp_path}/mlflow.db")
    run_dir = RunDir.of(config)
    first = open_tracker(config, run_dir, "aaa")  # as earlier versions record it
    assert open_tracker(config, run_dir, "aaa 111").run_id == first.run_id
    for other in ("bbb 111", "aaa 222", "bbb"):  # of training and held-out data
        with pytest.raises(UserError, match="data_path=.*the records are not those"):
            open_tracker(config, run_dir, other)
    (run_dir.checkpoints.local / "step-100").rmdir()  # nothing was trained on the first ones
    assert open_tracker(config, run_dir, "bbb").run_id == first.run_id


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
    unfinished: TrainConfig, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        changed(unfinished, **values)


def test_a_run_in_a_folder_that_cannot_be_written_is_one_line(
    unfinished: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"^output_dir=.*/file: cannot be written \(Not a directory\); make room, or give"
    ):
        run_training(changed(unfinished, output_dir=str(tmp_path / "file")))


def test_a_disk_that_fills_up_on_the_way_is_one_line(unfinished: TrainConfig) -> None:
    disk_full = OSError(errno.ENOSPC, "No space left on device", "loss.png")
    path, name, output_dir = RunDir.of(unfinished).path, unfinished.run.name, unfinished.run.output_dir
    with (
        pytest.raises(
            UserError,
            match=rf"^output_dir={output_dir}: cannot be written \(No space left on device\); make room",
        ),
        lock_dir(path, name, output_dir),
    ):
        raise_if_final(failed(ray.exceptions.RayActorError(error_msg="The actor died."), disk_full), 1)
    with (
        pytest.raises(ConnectionError),
        lock_dir(path, name, output_dir),
    ):
        raise ConnectionError


def failed(*causes: Exception) -> ray.train.WorkerGroupError:
    return ray.train.WorkerGroupError("workers failed", dict(enumerate(causes)))


def test_losses_are_restarted_a_few_times_and_other_failures_are_final() -> None:
    lost = ray.exceptions.RayActorError(error_msg="The actor died.")
    for times in range(1, 4):
        raise_if_final(failed(lost), times)
        raise_if_final(lost, times)
    with pytest.raises(UserError, match="lost 4 times without a new checkpoint .*lower batch_size") as error:
        raise_if_final(failed(lost), 4)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="lora_targets"):  # the other worker was lost because this one ended
        raise_if_final(failed(lost, UserError("lora_targets: no such layer")), 1)
    with pytest.raises(ray.train.WorkerGroupError):
        raise_if_final(failed(ZeroDivisionError()), 1)


def test_a_worker_that_raises_is_final_and_told_also_where_the_others_lose_it() -> None:
    peer = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    with pytest.raises(ray.train.WorkerGroupError) as caught:
        raise_if_final(failed(peer, ZeroDivisionError("in the loop")), 1)
    assert list(caught.value.worker_failures) == [1]


def test_a_lost_process_is_told_with_the_reason_of_the_process_that_ended() -> None:
    peer = ConnectionResetError("reset by peer")
    killed = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMore.")
    with pytest.raises(UserError, match=r"\(Task was killed due to the node running low on memory\.\);"):
        raise_if_final(failed(peer, killed), 4)
    died = ray.exceptions.RayActorError(
        error_msg="The actor died.\n\tpid: 7\nThe actor died. Worker exit type: SYSTEM_ERROR "
        "Worker exit detail: Worker unexpectedly exits with a connection error."
    )
    with pytest.raises(UserError, match=r"\(Worker unexpectedly exits with a connection error\.\);"):
        raise_if_final(failed(peer, died), 4)


@pytest.mark.parametrize(
    ("workers", "reserved"),
    [
        ({}, [1.0, 0.5]),
        # An elastic run waits for a free node rather than crowd the workers of those that are left.
        ({"min_workers": 1}, [1.0, 1.0]),
    ],
)
def test_a_restart_reserves_a_share_of_the_cpus_that_are_left(
    unfinished: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    workers: dict[str, object],
    reserved: list[float],
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 1.0}} for _ in range(2)]
    starts: list[float] = []

    class Trainer:
        def __init__(self, task: object, cpus: float, callbacks: object) -> None:
            starts.append(cpus)

        def fit(self) -> SimpleNamespace:
            if len(nodes) == 2:
                nodes.pop()
                raise failed(ray.exceptions.RayActorError(error_msg="The actor died."))
            return SimpleNamespace(return_value=Outcome(finished=True, step=1, metrics={}))

    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(fit, "_trainer", Trainer)
    monkeypatch.setattr(fit, "remove_placement_groups_of_lost_actors", lambda: None)  # no Ray runs here
    config = changed(unfinished, num_workers=2, **workers)
    task = WorkerTask(config, RunDir.of(config), (), (), "", "", batches_per_epoch=1)
    run: Any = SimpleNamespace(task=task, files=SimpleNamespace(train=[]))
    assert fit.fit(run).finished
    assert starts == reserved


def as_ray_raises(cause: Exception) -> ray.train.WorkerGroupError:
    """An error of the batch server as it reaches the driver, through the worker that called it."""
    try:
        raise ray.exceptions.RayTaskError(
            "BatchServer.next_batch()", "Traceback", cause
        ).as_instanceof_cause()
    except ray.exceptions.RayTaskError as error:
        return failed(error)


def test_a_failure_of_the_batch_server_is_raised_unwrapped() -> None:
    with pytest.raises(UserError, match="^data_path=a.jsonl: gone$"):
        raise_if_final(as_ray_raises(UserError("data_path=a.jsonl: gone")), 1)
    with pytest.raises(ray.train.WorkerGroupError):  # it would happen again
        raise_if_final(as_ray_raises(ZeroDivisionError()), 1)
    for temporary in (ConnectionResetError("reset by peer"), ray.exceptions.OutOfMemoryError("killed")):
        raise_if_final(as_ray_raises(temporary), 3)
    with pytest.raises(UserError, match=r"lost 4 times .*\(reset by peer\)"):
        raise_if_final(as_ray_raises(ConnectionResetError("reset by peer")), 4)


def test_without_a_commit_only_its_tag_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    assert {"code_sha256", "version.torch"} <= code_version().keys()
    assert "mlflow.source.git.commit" not in code_version()


def test_the_code_version_covers_library_and_workloads() -> None:
    names = [name for name, _ in source_files()]
    assert {"parallelmind/visibility.py", "workloads/train/provenance.py"} <= set(names)


def test_code_version_and_loss_plot_are_recorded(tmp_path: Path) -> None:
    tags = code_version()
    assert len(tags["code_sha256"]) == 12
    assert tags == code_version()
    assert "version.torch" in tags
    run_dir = RunDir(RemotePath(tmp_path), "adapter", "")
    metrics = MetricsFile(run_dir.metrics_file)
    for step in range(1, 9):
        metrics.append({"loss": 3 / step, **({"validation/loss_4": 4 / step} if step % 4 == 0 else {})}, step)
    save_loss_plot(run_dir)
    assert run_dir.loss_plot.local.read_bytes().startswith(b"\x89PNG")
