"""Check an installation, or a cluster, before the first run on it.

    python -m workloads.doctor
    python -m workloads.doctor ray_address=10.0.0.1:6379 output_dir=/shared/runs mlflow_uri=http://10.0.0.1:5000

Prints one line per check: ok, warn or FAIL, the result and, after a semicolon, the remedy. A check that needs
a failed one is marked skip. The last check trains for three steps and decodes with the adapter, in a folder
that is removed afterwards. Exits with 1 if a check failed.
"""

from __future__ import annotations

import sys

from parallelmind import cli
from parallelmind.ray_env import MLFLOW_FAIL_FAST_ENV, set_env_defaults
from workloads.doctor import library_check, machine_checks, ray_check, storage_checks
from workloads.doctor.check import Check, run_checks
from workloads.doctor.config import DoctorConfig
from workloads.doctor.end_to_end_check import check_end_to_end
from workloads.doctor.mlflow_check import check_mlflow

CHECKS = (
    Check("libraries", library_check.check_libraries),
    Check("model", machine_checks.check_model, ("libraries",)),
    Check("gpu", machine_checks.check_gpu, ("libraries",)),
    Check("memory", machine_checks.check_memory, ("libraries",)),
    Check("disk", machine_checks.check_disk),
    Check("ray", ray_check.check_ray, ("libraries",)),
    Check("storage", storage_checks.check_storage),
    Check("nodes", storage_checks.check_nodes, ("ray", "storage")),
    Check("mlflow", check_mlflow, ("libraries",)),
    Check("end to end", check_end_to_end, ("model", "gpu", "ray", "nodes")),
)


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", DoctorConfig)
        return
    config = cli.parse(DoctorConfig, argv)
    set_env_defaults(MLFLOW_FAIL_FAST_ENV)
    failed = False
    for name, result in run_checks(CHECKS, config):
        print(result.line(name), flush=True)
        failed |= result.status == "FAIL"
    if failed:
        sys.exit(1)
