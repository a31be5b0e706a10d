"""Environment variables of Ray, MLflow and wandb that the project shares. Import this module before Ray.

Ray reads some of these variables only when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping


def set_env_defaults(variables: Mapping[str, str]) -> None:
    """Set each environment variable unless the user has set it."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


set_env_defaults(
    {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would upload the working directory
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)

# For a cluster that this process starts; a cluster that it joins has its own settings.
LOCAL_CLUSTER_ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # raylets listen on 127.0.0.1 only
    # On two cores Ray's metrics and task events cost a tenth of the compute.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    # A run starts a dozen processes that mostly wait. Ray's default limit is the number of cores, and Ray
    # warns about every process beyond it.
    "RAY_worker_maximum_startup_concurrency": "8",
}
# By default MLflow retries an unreachable server for minutes; with these it fails within seconds.
MLFLOW_FAIL_FAST_ENV = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
# Its own lines would stand between ours, and its error reports leave the machine.
WANDB_ENV = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
