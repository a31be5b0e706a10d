"""Experiments: each file asks one question and returns its configuration from `config()`."""
