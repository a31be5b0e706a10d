"""Train an adapter, on this machine or on a Ray cluster.

    python -m workloads.train EXPERIMENT|CONFIG.yaml [key=value …]

EXPERIMENT is a file in experiments/ (demo, experiments/demo.py) whose config() returns the settings; CONFIG.yaml is any
file of settings, such as the config.yaml of an earlier run. The run's folder is output_dir/name-hash. The same command
again resumes an interrupted run from its newest checkpoint, and leaves a finished one as it is. Ctrl-C saves a checkpoint first.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from parallelmind import cli
from parallelmind.config import TrainConfig, load_yaml
from parallelmind.data.files import find_files
from parallelmind.errors import UserError
from workloads.settings import read_config

# In a run's folder.
CHECKPOINTS, STOP, ADAPTER, MODEL, QUARANTINE = "checkpoints", "STOP", "adapter", "model", "quarantine.jsonl"
_COMPLETE = "parallelmind.json"  # the adapter folder appears whole, this file with it


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", TrainConfig)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    run_training(read_config(TrainConfig, argv))


def run_training(config: TrainConfig) -> Path:
    """Train `config` to the end, unless that is done already; returns the run's folder.

    Raises UserError for what the user can mend, and KeyboardInterrupt when stopped, with a checkpoint saved.
    """
    folder = run_folder(config)
    result = result_folder(config, folder)
    if (result / _COMPLETE).is_file():
        print(f"finished before: {result}; change a field or the name to train another")
        return folder
    _refuse_changed(config, folder)
    files = find_files(config.data_path)
    held_out = find_files(config.validation_path, "validation_path") if config.validation_path else []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0), ThreadPoolExecutor(1) as beside:
            from workloads import cluster

            connecting = beside.submit(cluster.connect, config.ray_address)
            from workloads.train_driver import execute  # imports torch and MLflow, which takes as long as Ray to start

            execute(config, folder, files, held_out, connecting.result)
    except Timeout as error:
        remedy = "wait for it, or choose another name"
        raise UserError(f"name={config.name}: another process is training {folder}; {remedy}") from error
    return folder


def run_folder(config: TrainConfig) -> Path:
    """`output_dir/name-hash`, absolute."""
    return Path(config.output_dir).expanduser().absolute() / f"{config.name}-{config.fingerprint()[:8]}"


def result_folder(config: TrainConfig, folder: Path) -> Path:
    """Where a finished run leaves what it trained."""
    return folder / (ADAPTER if config.tuning == "lora" else MODEL)


def _refuse_changed(config: TrainConfig, folder: Path) -> None:
    """Raises UserError, naming the fields, if an unfinished run of the same name was begun with other settings."""
    ours = config.model_dump(mode="json")
    for other in folder.parent.glob(f"{config.name}-*/config.yaml"):
        begun, left = load_yaml(other), other.parent
        results = [left / name / _COMPLETE for name in (ADAPTER, MODEL)]
        if left == folder or begun.get("name") != config.name or not any(left.glob(f"{CHECKPOINTS}/step-*")):
            continue
        if not any(result.is_file() for result in results):
            fields = [name for name, value in begun.items() if name in ours and name not in config.WHERE and ours[name] != value]
            told = ", ".join(f"{name}={begun[name]} (now {ours[name]})" for name in fields)
            raise UserError(
                f"name={config.name}: the unfinished run {left} has {told}; "
                "give it these values to go on with it, choose another name, or remove its folder"
            )


if __name__ == "__main__":
    cli.run(main)
