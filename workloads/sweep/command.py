"""Search a space of training runs, on this machine or on a Ray cluster.

    python -m workloads.sweep EXPERIMENT|SWEEP.yaml [key=value …]

EXPERIMENT is a file in experiments/ whose config() returns a SweepConfig: the settings of a training run
(train), what differs between its trials (space, points, seeds), how points are chosen (search) and what is
minimized (metrics). train.FIELD=VALUE overrides a setting of the run. The sweep's folder is
train.output_dir/name-hash. It holds the trials' run folders, report.html with its plots, trials.csv,
trials.parquet and journal.jsonl. After an interruption the same command resumes the sweep from the journal:
trials that ended are not repeated, others resume from their checkpoints. The best adapter becomes a version
of the registered model `register_as`.
"""

from __future__ import annotations

import signal

from parallelmind import cli
from parallelmind.config import TrainConfig
from parallelmind.config.yaml_file import yaml_values
from parallelmind.remote import RemotePath
from workloads.common.devices import decide_training
from workloads.common.read_config import read_config
from workloads.sweep.config import SweepConfig
from workloads.sweep.space import check_space
from workloads.train.data_files import DataFiles
from workloads.train.preflight import check_run
from workloads.train.run_dir import lock_dir


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", SweepConfig)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    run_sweep(read_config(SweepConfig, argv))


def run_sweep(config: SweepConfig) -> RemotePath:
    """Run every trial that has not ended, write the report and register the winner.

    Returns the sweep's folder. Raises UserError, before anything starts, for a space that training rejects
    and for trials that do not fit on the cluster. Raises KeyboardInterrupt when stopped; checkpoints of the
    trials are saved then.
    """
    check_space(config)
    check_run(config.train, DataFiles.find(config.train.data))
    config = config.replace(train=decide_training(config.train, forward_output=False))
    sweep_dir = sweep_dir_of(config)
    with lock_dir(sweep_dir, config.name, config.train.run.output_dir):
        from workloads.sweep.driver import execute  # imports Ray

        execute(config, sweep_dir)
    return sweep_dir


def sweep_dir_of(config: SweepConfig) -> RemotePath:
    """`output_dir/name-hash`. The hash leaves out the number of trials and where they run.

    Without a `global_batch_size`, which a trial may change, the batches of all workers count as accumulated.
    """
    train = config.train
    if train.optimizer.global_batch_size is not None:
        return _sweep_dir(config, None)
    sweep_dir = _sweep_dir(config, train.batches_per_step)
    if train.workers.num_workers > 1:  # earlier versions did not count the workers
        earlier = _sweep_dir(config, train.optimizer.accumulation_steps or 1)
        content = earlier.child("config.yaml").read_bytes()
        stored = yaml_values(content, f"{earlier}/config.yaml")["train"] if content else {}
        if stored.get("num_workers") == train.workers.num_workers:
            return earlier
    return sweep_dir


def _sweep_dir(config: SweepConfig, accumulation_steps: int | None) -> RemotePath:
    fields = TrainConfig.flat_fields()
    values = {name: fields[name].default for name in TrainConfig.NON_IDENTITY_FIELDS}
    values |= {"use_gpu": False, "accumulation_steps": accumulation_steps}  # use_gpu: the default of 0.1.0
    identity = config.model_copy(update={"train": config.train.replace(**values)})
    return RemotePath.at(config.train.run.output_dir).child(f"{config.name}-{identity.fingerprint()[:8]}")
