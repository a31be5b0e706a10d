"""Checks the MLflow tracking store."""

from __future__ import annotations

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from workloads.doctor.check import CheckResult
from workloads.doctor.config import DoctorConfig
from workloads.doctor.storage_probe import temporary_subdir

_EXPERIMENT: str = TrainConfig.flat_fields()["mlflow_experiment"].default


def check_mlflow(config: DoctorConfig) -> CheckResult:
    """Whether a run can be tracked. Raises UserError if not. Leaves no database that was not there before."""
    from parallelmind.tracking import absolute_uri, check_store, sqlite_file, sqlite_uri

    uri = absolute_uri(config.mlflow_uri)
    file = sqlite_file(uri)
    if file is None or file.exists():
        is_gone = check_store(uri, _EXPERIMENT)
        outcome = "removed it" if is_gone else "marked it as deleted (until `mlflow gc`)"
        return CheckResult("ok", f"created a run in {uri}, logged to it and {outcome}")
    try:
        with temporary_subdir(file.parent) as folder:
            check_store(sqlite_uri(folder / file.name), _EXPERIMENT)
    except OSError as error:
        raise UserError(
            f"mlflow_uri={uri}: cannot be created ({error.strerror}); "
            "choose a folder that this user may write to"
        ) from error
    return CheckResult("ok", f"{uri} does not exist yet; a temporary database beside it worked")
