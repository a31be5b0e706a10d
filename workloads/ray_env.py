"""Ray's settings for every workload, in the environment. Import this before Ray: it reads some of them only then."""

from __future__ import annotations

import os

for _name, _value in {
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # a worker's progress lines read like our own
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would upload the working directory
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # print prints
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # five seconds less for a short run, and less work beside it than at 0.1
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # then tried again, on fewer nodes if one was lost, else as before
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where the user is
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # lost workers are replaced all the same, see workloads.train
}.items():
    os.environ.setdefault(_name, _value)
if not os.environ.get("RAY_ADDRESS"):  # a cluster of our own: on two cores its bookkeeping costs a tenth of the training
    for _name, _value in {
        "RAY_task_events_report_interval_ms": "0",
        "RAY_metrics_report_interval_ms": "60000",
        "RAY_enable_metrics_collection": "0",
        "RAY_event_stats": "0",
    }.items():
        os.environ.setdefault(_name, _value)
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # a cluster that is joined has made its own choice
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # raylets of a local cluster listen on 127.0.0.1 only
