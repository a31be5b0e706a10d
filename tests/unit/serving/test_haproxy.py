"""serving/runtime/haproxy, which Serve calls in place of HAProxy: what it makes of the configuration that
Serve has written.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from serving.runtime.ray_env import SERVE

WRITTEN = """defaults
    option abortonclose
    option splice-request
frontend metrics
    bind :9101
frontend http
    bind *:8000
listen stats
  bind *:8404
"""


def test_its_own_statistics_stay_on_this_machine_and_who_leaves_is_seen(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(WRITTEN)
    ports = {"RAY_SERVE_HAPROXY_METRICS_PORT": "9101", "RAY_SERVE_HAPROXY_STATS_PORT": "8404"}
    env = {"PATH": "/usr/bin:/bin", "PARALLELMIND_HAPROXY": "echo", **ports}
    line = [SERVE["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)]
    assert (
        subprocess.run(line, env=env, capture_output=True, text=True, check=True).stdout.split() == line[1:]
    )
    assert "option abortonclose" in config.read_text()
    assert "splice-request" not in config.read_text()
    binds = [found.split()[1] for found in config.read_text().splitlines() if "bind" in found]
    assert binds == ["127.0.0.1:9101", "*:8000", "127.0.0.1:8404"]
    assert (tmp_path / "500.http").read_text().startswith("HTTP/1.1 503 ")
