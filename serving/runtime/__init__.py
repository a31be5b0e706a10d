"""Ports, environment and proxy of a server of our own."""
