"""Train an adapter, on this machine or on a Ray cluster.

    python -m workloads.train EXPERIMENT|CONFIG.yaml [key=value …]

EXPERIMENT is a file in experiments/ (demo, experiments/demo.py) whose config() returns the settings;
CONFIG.yaml is any file of settings, such as the config.yaml of an earlier run. The run folder is
output_dir/name-hash. The same command resumes an interrupted run from its newest checkpoint, and leaves a
finished one as it is. Ctrl-C saves a checkpoint first.
"""

from __future__ import annotations

import signal

from parallelmind import cli
from parallelmind.config import TrainConfig
from workloads.common.read_config import read_config
from workloads.train.run import run_training


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", TrainConfig)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    run_training(read_config(TrainConfig, argv))
