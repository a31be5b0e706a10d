"""The HTTP interface: request and response schemas, response formats, errors."""
