"""Environment variables of Ray and Ray Serve for the server.

Set them before Ray is imported, which reads some only then. On a cluster they belong in the environment of
`ray start`.
"""

from __future__ import annotations

import os
import sys
from ctypes.util import find_library

from parallelmind.ray_env import LOCAL_CLUSTER_ENV, set_env_defaults
from serving.runtime.ray_private import PROXY_ENV_VARIABLE, haproxy_env

# The ingress calls engines over gRPC, without the object store, and every process has one event loop.
SERVE_ENV = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    # A lost proxy is back in seconds; by default it takes half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "4",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",  # at the default of 0.1 s the controller takes half a core
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",  # by default ten times a second in every process
}


def preload_tcmalloc() -> str | None:
    """Make the processes that this one starts allocate with tcmalloc, unless the user preloads a library.

    Returns the library; None if it is not installed.
    """
    if sys.platform != "linux" or "LD_PRELOAD" in os.environ:
        return None
    library = find_library("tcmalloc_minimal")
    if library is not None:
        os.environ["LD_PRELOAD"] = library
    return library


def set_serve_env(proxy: str | None = None) -> None:
    """Set every variable that the user has not set.

    proxy: "haproxy" or "serve"; None takes $PARALLELMIND_PROXY, by default "haproxy".
    """
    if proxy is not None:
        os.environ[PROXY_ENV_VARIABLE] = proxy
    set_env_defaults({**LOCAL_CLUSTER_ENV, **SERVE_ENV})
    if os.environ.get(PROXY_ENV_VARIABLE, "haproxy") == "haproxy":
        set_env_defaults(haproxy_env())
