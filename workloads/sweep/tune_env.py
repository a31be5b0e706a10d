"""Ray Tune's environment variables for a sweep. Import this module before Ray."""

from __future__ import annotations

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
from parallelmind.ray_env import set_env_defaults

set_env_defaults(
    {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard copies of every result
        "RAY_AIR_NEW_OUTPUT": "0",  # no tables on the terminal
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune saves its state, which nothing reads, once an hour
    }
)
