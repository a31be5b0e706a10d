"""Measurements of a model on held-out text, and the laws that a patched model obeys."""
