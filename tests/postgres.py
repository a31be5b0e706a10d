"""A PostgreSQL server on loopback, from Debian's package postgresql."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.runtime.ports import free_port

_WAIT_S = 60


def bin_dir() -> Path | None:
    """The folder of the server's programs, which Debian does not put on the PATH; None if not installed."""
    initdb = shutil.which("initdb")
    return max(
        Path("/usr/lib/postgresql").glob("*/bin"), default=Path(initdb).resolve().parent if initdb else None
    )


@contextmanager
def server() -> Iterator[str]:
    """A running server; yields the URI of an empty database.

    If this process is root, the account `postgres` runs the server, which refuses to run as root.
    """
    folder, port = bin_dir(), free_port()
    assert folder is not None
    account = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="pm-pg-") as name:
        data_dir = Path(name)
        if account:
            shutil.chown(data_dir, account)
        init_command = [folder / "initdb", "-D", data_dir / "data", "-U", "mlflow", "-A", "trust"]
        subprocess.run(init_command, check=True, user=account, capture_output=True)
        line = [
            folder / "postgres",
            "-D",
            data_dir / "data",
            "-h",
            "127.0.0.1",
            "-p",
            str(port),
            "-k",
            data_dir,
        ]
        process = subprocess.Popen(line, user=account, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(folder, port, process)
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # ends at once; SIGTERM would wait for open connections
            process.wait(timeout=30)


def _wait_for(folder: Path, port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _WAIT_S
    is_ready = [folder / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(is_ready, capture_output=True, check=False).returncode:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
