"""Runs of the same name: the one to resume, and one that other settings must not replace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parallelmind.config import TrainConfig, resolve
from parallelmind.config.yaml_file import yaml_values
from parallelmind.errors import UserError, format_value
from parallelmind.redaction import has_hidden_part, redact_values
from parallelmind.remote import RemotePath
from workloads.train.run_dir import ADAPTER, MODEL, RunDir


def find_run_dir(config: TrainConfig) -> RunDir:
    """The folder of the run: `RunDir.of`, or the one that an earlier version began or finished it in."""
    run_dir = RunDir.of(config)
    if run_dir.config_file.read_bytes() is None:
        for other, settings in _others(config, run_dir):
            earlier = _earlier_run(config, other, settings)
            if earlier is not None and (earlier.is_finished() or earlier.has_checkpoint()):
                return earlier
    return run_dir


def check_no_changed_run(config: TrainConfig, run_dir: RunDir) -> None:
    """Refuse a run if an unfinished run of the same name has other settings.

    Raises:
        UserError: names the fields that differ.
    """
    for other, settings in _others(config, run_dir):
        if not _is_unfinished(other):
            continue
        differences = _differences(settings, config, other)
        raise UserError(
            f"name={config.run.name}: the unfinished run {other} has {differences}; "
            "use its values to resume it, choose another name, or remove its folder"
        )


def _others(config: TrainConfig, run_dir: RunDir) -> Iterator[tuple[RemotePath, dict[str, Any]]]:
    """The folders of other runs of the same name, with their settings."""
    runs = run_dir.path.parent
    for name in runs.list_names():
        other = runs.child(name)
        if not name.startswith(f"{config.run.name}-") or other == run_dir.path:
            continue
        content = other.child("config.yaml").read_bytes()
        if content is not None:
            settings = yaml_values(content, f"{other}/config.yaml")
            if settings.get("name") == config.run.name:
                yield other, settings


def _earlier_run(config: TrainConfig, folder: RemotePath, settings: dict[str, Any]) -> RunDir | None:
    """The run of an earlier version in a folder; None if its settings or its name differ from `config`."""
    try:
        stored = _stored_config(config, folder, settings)
    except UserError:  # of a version whose fields this one does not know
        return None
    earlier = RunDir.of_earlier_version(stored)
    is_same = stored.fingerprint() == config.fingerprint() and earlier.path.local.name == folder.local.name
    return earlier if is_same else None


def _stored_config(config: TrainConfig, folder: RemotePath, settings: dict[str, Any]) -> TrainConfig:
    """The settings of another run. Passwords, which are not stored, are those of `config`."""
    current = config.model_dump()
    values = {
        name: current.get(name, value) if isinstance(value, str) and has_hidden_part(value) else value
        for name, value in settings.items()
    }
    values["output_dir"] = config.run.output_dir
    return resolve(TrainConfig, values, source=f"{folder}/config.yaml")


def _is_unfinished(folder: RemotePath) -> bool:
    runs = [RunDir(folder, result_name, "") for result_name in (ADAPTER, MODEL)]
    return runs[0].has_checkpoint() and not any(run.is_finished() for run in runs)


def _differences(settings: dict[str, Any], config: TrainConfig, folder: RemotePath) -> str:
    """The settings of another run that differ. A run of an earlier version has later fields at defaults."""
    stored = _stored_config(config, folder, settings).with_global_batch_size()
    current = redact_values(config.with_global_batch_size().model_dump(mode="json"))
    return ", ".join(
        f"{name}={format_value(value)} (now {format_value(current[name])})"
        for name, value in redact_values(stored.model_dump(mode="json")).items()
        if name not in config.NON_IDENTITY_FIELDS and current[name] != value
    )
