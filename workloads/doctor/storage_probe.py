"""Read and write probes of a folder or URI, run in the driver and on the nodes of a cluster.

A probe returns what is wrong as text, or None.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parallelmind.errors import UserError
from parallelmind.remote import RemotePath

_DRIVER_FILE = "driver"


@contextmanager
def temporary_subdir(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`. Removes it, and the parts of `folder` that had to be created.

    Raises OSError if it cannot be created.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A network file system keeps files that are still open, and so their folder.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-", ignore_cleanup_errors=True) as name:
            yield Path(name)
    finally:
        for path in missing:
            with suppress(OSError):  # another process has written into it
                path.rmdir()


def write_read_rename(folder: Path, name: str) -> None:
    """Write, rename, read and remove a small folder. Raises OSError for what does not work."""
    source, target = folder / f"{name}-part", folder / f"{name}-whole"
    source.mkdir()
    (source / "file").write_text(name)
    source.rename(target)
    if (target / "file").read_text() != name:
        raise OSError(f"{target} does not hold what was written to it")
    shutil.rmtree(target)


def probe_uri(node: str, folder: RemotePath) -> str | None:
    """Write a file to a URI, read it back and delete it."""
    file = folder.child(node)
    file.local.parent.mkdir(parents=True, exist_ok=True)
    file.local.write_text(node)
    try:
        file.upload()
        content = file.read_bytes()
        file.delete_remote()
    except UserError as error:
        return str(error)
    finally:
        file.local.unlink()
    return None if content == node.encode() else f"{file} does not hold what was written to it"


def write_driver_file(folder: Path) -> None:
    """In the driver: write the file that `probe_from_node` reads on every node."""
    (folder / _DRIVER_FILE).write_text(folder.name)


def probe_from_node(node: str, folder: Path) -> str | None:
    """On a node: read the driver's file, write, and leave a file for `probe_node_file`."""
    try:
        if (folder / _DRIVER_FILE).read_text() != folder.name:
            return f"holds other files in {folder}"
        write_read_rename(folder, node)
        (folder / node).write_text(node)
    except OSError as error:
        return f"cannot use what the driver wrote there ({error.strerror or error})"
    return None


def probe_node_file(node: str, folder: Path) -> str | None:
    """In the driver, afterwards: look for the file that a node has left."""
    return None if (folder / node).is_file() else "wrote a file that the driver does not see"
