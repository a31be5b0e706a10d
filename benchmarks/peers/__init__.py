"""Drivers of engines: each is a process that reads requests as JSON lines and answers with JSON lines.

The drivers of other projects run in venvs of their own, without this project's dependencies.
"""
