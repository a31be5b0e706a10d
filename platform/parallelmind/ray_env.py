"""Settings of Ray, and of MLflow, that all of this project shares, in the environment. Import this before
Ray, which reads some only then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping


def set_env_defaults(settings: Mapping[str, str]) -> None:
    """Set what the user has not."""
    for name, value in settings.items():
        os.environ.setdefault(name, value)


set_env_defaults(
    {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would upload the working directory
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)
# For a cluster of our own; one that is joined has made its own choice.
LOCAL_CLUSTER_ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # raylets listen on 127.0.0.1 only
    # On two cores bookkeeping that nobody looks at costs a tenth of the work.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    # A run is a dozen processes that mostly wait; with as few cores as processes Ray would warn of so many.
    "RAY_worker_maximum_startup_concurrency": "8",
}
# For whoever had better be told than wait: by itself MLflow asks a server that is away for minutes.
MLFLOW_FAIL_FAST_ENV = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
