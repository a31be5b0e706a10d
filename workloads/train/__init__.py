"""Train an adapter: prepare, fit, conclude."""
