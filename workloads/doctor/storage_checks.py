"""Whether a folder can be used, and whether the nodes of a cluster see the same files in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parallelmind.errors import UserError
from parallelmind.remote import RemotePath

_MARK = "driver"


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder of our own in `folder`; afterwards nothing is left, nor what had to be made of `folder`
    itself.

    Raises OSError where it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A network file system keeps files that are still open, and their folder with them.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-", ignore_cleanup_errors=True) as place:
            yield Path(place)
    finally:
        for path in made:
            with suppress(OSError):  # somebody else has put something there meanwhile
                path.rmdir()


def exercise(place: Path, name: str) -> None:
    """Write, read back, rename and remove a small folder. Raises OSError for what does not work."""
    begun, done = place / f"{name}-part", place / f"{name}-whole"
    begun.mkdir()
    (begun / "file").write_text(name)
    begun.rename(done)
    if (done / "file").read_text() != name:
        raise OSError(f"{done} does not hold what was written to it")
    shutil.rmtree(done)


def round_trip(node: str, place: RemotePath) -> str | None:
    """Write a file to a URI, read it back and remove it; what is wrong, if anything is."""
    file = place.child(node)
    file.local.parent.mkdir(parents=True, exist_ok=True)
    file.local.write_text(node)
    try:
        file.upload()
        read = file.read_bytes()
        file.delete_remote()
    except UserError as error:
        return str(error)
    finally:
        file.local.unlink()
    return None if read == node.encode() else f"{file} does not hold what was written to it"


def mark(place: Path) -> None:
    """What a node has to find."""
    (place / _MARK).write_text(place.name)


def seen_from(node: str, place: Path) -> str | None:
    """On a node: what is wrong with the driver's folder there. Leaves a file by which the driver sees that it
    is the same.
    """
    try:
        if (place / _MARK).read_text() != place.name:
            return f"holds other files in {place}"
        exercise(place, node)
        (place / node).write_text(node)
    except OSError as error:
        return f"cannot use what the driver wrote there ({error.strerror or error})"
    return None


def seen_here(node: str, place: Path) -> str | None:
    """In the driver, afterwards: what is wrong with the file that a node has left."""
    return None if (place / node).is_file() else "wrote a file that the driver does not see"
