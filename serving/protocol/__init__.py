"""Requests and responses: schemas, response formats, errors."""
