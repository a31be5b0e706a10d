"""Check an installation, or a cluster, before the first run on it.

    python -m workloads.doctor
    python -m workloads.doctor ray_address=10.0.0.1:6379 output_dir=/shared/runs mlflow_uri=http://10.0.0.1:5000

One line for each check: ok, warn or FAIL, what was found and, after a semicolon, what to do about it; skip
stands for a check that rests on one which failed. The last one trains for three steps and decodes with the
adapter, as a run of yours would, in a folder that is removed. Exits with 1 if a check failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

try:
    from parallelmind import cli
    from parallelmind.errors import UserError, first_line
    from parallelmind.ray_env import MLFLOW_FAIL_FAST_ENV, set_env_defaults
    from workloads.doctor import cluster_checks as doctor_cluster
    from workloads.doctor import local_checks as doctor_checks
    from workloads.doctor.local_checks import CheckResult, DoctorConfig, Status
except ModuleNotFoundError as missing:  # not even what a command line needs
    sys.exit(
        f"FAIL  libraries   {missing.name} is missing; run `make setup`, or pip install -e . in the project's folder"
    )


@dataclass(frozen=True, slots=True)
class Check:
    """needs: the checks without which this one tells nothing new."""

    name: str
    find: Callable[[DoctorConfig], CheckResult]
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("libraries", doctor_checks.libraries),
    Check("model", doctor_checks.model, ("libraries",)),
    Check("gpu", doctor_checks.gpu, ("libraries",)),
    Check("memory", doctor_checks.memory, ("libraries",)),
    Check("disk", doctor_checks.disk),
    Check("ray", doctor_cluster.ray_cluster, ("libraries",)),
    Check("storage", doctor_cluster.storage),
    Check("nodes", doctor_cluster.nodes, ("ray", "storage")),
    Check("mlflow", doctor_cluster.mlflow, ("libraries",)),
    Check("end to end", doctor_cluster.end_to_end, ("model", "gpu", "ray", "nodes")),
)


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        return cli.print_help(__doc__ or "", DoctorConfig)
    config = cli.parse(DoctorConfig, argv)
    set_env_defaults(MLFLOW_FAIL_FAST_ENV)
    failed = False
    for finding in findings(CHECKS, config):
        print(finding.line(), flush=True)
        failed |= finding.status == "FAIL"
    if failed:
        sys.exit(1)
    return None


def findings(checks: Sequence[Check], config: DoctorConfig) -> Iterator[CheckResult]:
    """What each check found, as it does."""
    ended: dict[str, Status] = {}
    for check in checks:
        lacking = [need for need in check.needs if ended[need] in ("FAIL", "skip")]
        finding = (
            CheckResult(check.name, "skip", f"needs {' and '.join(lacking)}")
            if lacking
            else _found(check, config)
        )
        ended[check.name] = finding.status
        yield finding


def _found(check: Check, config: DoctorConfig) -> CheckResult:
    try:
        return check.find(config)
    except UserError as error:
        said, _, remedy = str(error).rpartition("; ")
        return CheckResult(check.name, "FAIL", said, remedy)
    except Exception as error:  # whatever it is, the other checks still have something to tell
        return CheckResult(
            check.name,
            "FAIL",
            f"{type(error).__name__}: {first_line(error)}",
            "not foreseen: please report it",
        )
