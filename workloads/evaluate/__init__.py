"""Measure a model on held-out text, and check which model types hold parallel branches."""
