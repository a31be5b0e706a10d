"""A PostgreSQL server on loopback, from Debian's package."""

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


def programs() -> Path | None:
    """The folder of the server's programs; Debian leaves them out of the PATH."""
    found = shutil.which("initdb")
    return max(
        Path("/usr/lib/postgresql").glob("*/bin"), default=Path(found).resolve().parent if found else None
    )


@contextmanager
def server() -> Iterator[str]:
    """The URI of an empty database. The server's own account runs it where this process is root, whom it
    refuses.
    """
    folder, port = programs(), free_port()
    assert folder is not None
    account = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="pm-pg-") as name:
        place = Path(name)
        if account:
            shutil.chown(place, account)
        made = [folder / "initdb", "-D", place / "data", "-U", "mlflow", "-A", "trust"]
        subprocess.run(made, check=True, user=account, capture_output=True)
        line = [folder / "postgres", "-D", place / "data", "-h", "127.0.0.1", "-p", str(port), "-k", place]
        process = subprocess.Popen(line, user=account, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(folder, port, process)
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # ends at once; SIGTERM would wait for whoever is connected
            process.wait(timeout=30)


def _wait_for(folder: Path, port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _WAIT_S
    ask = [folder / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(ask, capture_output=True, check=False).returncode:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
