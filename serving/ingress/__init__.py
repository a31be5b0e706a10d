"""The HTTP deployment: routes, limits, preprocessing, failover."""
