"""An S3 server on loopback that keeps its objects in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "runs"


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """Start the server with an empty bucket. Yields the environment variables for S3 clients."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    threading.Thread(target=app.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{app.server_port}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="key", aws_secret_access_key="secret"
        ).create_bucket(Bucket=BUCKET)
        yield {"AWS_ENDPOINT_URL": url, "MLFLOW_S3_ENDPOINT_URL": url, **keys}
    finally:
        app.shutdown()
        app.server_close()
