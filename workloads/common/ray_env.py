"""Ray's environment variables for every workload. Import this module before Ray.

Ray reads some of these variables only when it is imported.
"""

from __future__ import annotations

import os

from parallelmind.ray_env import LOCAL_CLUSTER_ENV, set_env_defaults

set_env_defaults(
    {
        "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # print a worker's progress lines as they are
        "RAY_DEDUP_LOGS": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # do not turn print() into log records
        # Ray's default adds five seconds to a short run; 0.1 costs CPU time throughout a run.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # After this time Ray Train retries, on fewer nodes if one was lost.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers keep the user's working directory
        "RAY_DATA_LOG_LEVEL": "ERROR",
        # workloads.train replaces lost workers itself.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
)
if not os.environ.get("RAY_ADDRESS"):
    set_env_defaults(LOCAL_CLUSTER_ENV)
