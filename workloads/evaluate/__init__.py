"""Measure a model on held-out text."""
