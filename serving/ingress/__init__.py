"""The ingress deployment: HTTP routes, limits, preprocessing and failover. It holds no model."""
