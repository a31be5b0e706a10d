"""Unmodified clients of OpenAI's API against this server: one script for each, in packages of its own."""
