"""Ray's settings for every workload, in the environment. Import this before Ray: it reads some of them only
then.
"""

from __future__ import annotations

import os

from parallelmind.ray_env import LOCAL_CLUSTER_ENV, set_env_defaults

set_env_defaults(
    {
        "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # a worker's progress lines read like our own
        "RAY_DEDUP_LOGS": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # print prints
        # five seconds less for a short run, and less work beside it than at 0.1
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # then tried again, on fewer nodes if one was lost, else as before
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where the user is
        "RAY_DATA_LOG_LEVEL": "ERROR",
        # lost workers are replaced all the same, see workloads.train
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
)
if not os.environ.get("RAY_ADDRESS"):
    set_env_defaults(LOCAL_CLUSTER_ENV)
