"""How many engines there should be: by branches that are decoded and that wait, not by requests, of which one
may hold many.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext


class BranchLoadPolicy:
    """A policy for `ray.serve.config.AutoscalingPolicy`; Serve adds its delays and bounds."""

    def __init__(self, branches_per_replica: float) -> None:
        self._each = branches_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        found = context.aggregated_metrics or {}
        branches = sum(sum(found.get(name, {}).values()) for name in ("live_branches", "waiting_branches"))
        wanted = max(branches, context.total_queued_requests or 0) / self._each
        return max(wanted, 1.0 if context.total_num_requests else 0.0), {}
