"""What an offline run of Weights & Biases has written, read with wandb's own messages."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _RECORD = 7, 32768, struct.Struct("<IHB")  # checksum, length, kind
_FULL, _LAST = 1, 4


@dataclass
class OfflineRun:
    """Content of a .wandb file.

    history: the values of each step. exit_code: None for a run that was killed.
    """

    run_id: str = ""
    project: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, float]] = field(default_factory=dict)
    artifacts: list[tuple[str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The offline runs below a folder, in the order of their starts."""
    files = sorted(folder.glob(".wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    return [_read(file) for file in files]


def _read(file: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun()
    for content in _records(file.read_bytes()):
        record = Record.FromString(content)
        if record.HasField("run"):
            run.run_id, run.project, run.group = record.run.run_id, record.run.project, record.run.run_group
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("history"):
            values = {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
            }
            run.history[values["_step"]] = values
        elif record.HasField("artifact"):
            run.artifacts.append((record.artifact.name, record.artifact.type))
        elif record.HasField("files"):
            run.files += [item.path for item in record.files.files]
        elif record.HasField("exit"):
            run.exit_code = record.exit.exit_code
    return run


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a file of blocks; one that crosses blocks is in several parts."""
    at, parts = _HEADER, b""
    while at + _RECORD.size <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _RECORD.size:
            at += left
            continue
        _, length, kind = _RECORD.unpack_from(content, at)
        at += _RECORD.size
        parts, at = parts + content[at : at + length], at + length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
