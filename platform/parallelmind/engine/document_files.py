"""Keys and values of documents in a folder: one safetensors file for each document."""

from __future__ import annotations

import os
import re
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from parallelmind.errors import UserError, UserNotice, first_line
from parallelmind.storage import atomic_binary_file, expand_home

MAX_DOCUMENT_BYTES = 10 << 30  # of a folder, by default

_FORMAT = "parallelmind-document-2"
# Of a document, or what a killed writer has left of one; no other file is removed.
_FILE = re.compile(r"\.?[0-9a-f]{32}-\d+\.safetensors(\.[0-9a-f]+\.part)?")

States = Mapping[str, Tensor]  # `[tokens, …]` each, by layer and kind


class SavedDocument(NamedTuple):
    """The states of a document whose first token has this time coordinate."""

    states: States
    start_time: int


class DocumentFiles:
    """A folder of at most `max_bytes`, which several processes may use; the longest unused files go first."""

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """Creates the folder. Raises UserError if it cannot be written to, and for a size below 1."""
        self.folder, self._max_bytes = Path(expand_home(str(folder))), max_bytes
        if max_bytes < 1:
            raise UserError(f"document_cache_bytes={max_bytes}: give 1 or more")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(self.folder, os.W_OK | os.X_OK)
        except OSError as error:
            raise UserError(
                f"document_cache={folder}: {error.strerror}; give a folder that can be written to"
            ) from error
        if not is_writable:
            raise UserError(f"document_cache={folder}: not writable; give a folder that can be written to")
        self._refused = set[str]()

    def has(self, name: str) -> bool:
        """Whether there is a file of this document that was not refused."""
        return name not in self._refused and self._path(name).is_file()

    def read(self, name: str, num_tokens: int) -> SavedDocument | None:
        """The states of a document; None if there are none.

        A file that is damaged or not of this document is refused with a UserNotice. `write` replaces it.
        """
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                states = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            return self._refuse(name, f"cannot be read ({first_line(error)})")
        if metadata.get("format") != _FORMAT or metadata.get("document") != name:
            return self._refuse(name, "is not the file of this document")
        if not states or any(len(rows) != num_tokens for rows in states.values()):
            return self._refuse(name, f"does not hold {num_tokens} tokens")
        start_time = int(metadata["start_time"])
        if metadata.get("checksum") != _checksum(states, start_time):
            return self._refuse(name, "is damaged (its checksum differs)")
        with suppress(OSError):  # the file of another user, or one that has just been removed
            os.utime(path)
        return SavedDocument(states, start_time)

    def write(self, name: str, document: SavedDocument) -> None:
        """Write a document, and remove files while there are too many.

        If they cannot be written, a UserNotice tells why.
        """
        states, start_time = document
        metadata = {
            "format": _FORMAT,
            "document": name,
            "start_time": str(start_time),
            "checksum": _checksum(states, start_time),
        }
        try:
            with atomic_binary_file(self._path(name)) as file:
                file.write(save(dict(states), metadata))
            self._refused.discard(name)
            self._remove_unused()
        except OSError as error:
            warnings.warn(
                f"document_cache={self.folder}: a document was not written ({error.strerror})",
                UserNotice,
                stacklevel=2,
            )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _refuse(self, name: str, reason: str) -> SavedDocument | None:
        """Tell why a file is not used; returns None, which stands for no document."""
        self._refused.add(name)
        warnings.warn(
            f"document_cache: {self._path(name)} {reason}; the document is computed anew",
            UserNotice,
            stacklevel=3,
        )
        return None

    def _remove_unused(self) -> None:
        files = list[tuple[float, int, Path]]()
        for path in self.folder.iterdir():
            if _FILE.fullmatch(path.name):
                with suppress(FileNotFoundError):  # another process has removed it
                    stat = path.stat()
                    files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _checksum(states: States, start_time: int) -> str:
    checksum = zlib.crc32(str(start_time).encode())
    for _, rows in sorted(states.items()):
        checksum = zlib.crc32(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
