"""What `workloads.generate` needs to go on with an output: what it was begun with, who writes it, how far it
is.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from parallelmind.data.files import find_files
from parallelmind.errors import UserError, format_value
from parallelmind.model.manifest import MANIFEST
from parallelmind.storage import atomic_file, sha256
from workloads.generate.config import GenerateConfig
from workloads.generate.source import Source, scan


def read_source(config: GenerateConfig, output: Path | None) -> Source:
    """The lines of data_path, without those of the output where that lies among them. Raises UserError for no
    file.
    """
    files = find_files(config.data_path or "")
    if output is not None:
        files = [file for file in files if not Path(file).resolve().is_relative_to(output.resolve())]
    return scan(files)


def settings_of(config: GenerateConfig, source: Source) -> dict[str, Any]:
    """All that the rows of an output depend on, by field."""
    fields = {**config.model_kwargs(), **config.sampling_kwargs(), "reduce": config.reduce}
    for name in ("base_model", "lora_path"):
        manifest = Path(fields.get(name) or "").expanduser() / MANIFEST
        if fields.get(name) and manifest.is_file():  # it holds the checksums of all that was trained
            fields[name] = f"{fields[name]} (sha256 {sha256(manifest)[:12]})"
    return {**fields, "data_path": f"{source.samples()} lines (sha256 {source.fingerprint})"}


@contextmanager
def alone_at(output: Path) -> Iterator[None]:
    """The only writer of an output, which is there. Raises UserError if another process is writing it."""
    number = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"output_path={output}: another process is writing it; wait for it, or choose another name"
        ) from error
    finally:
        os.close(number)


class OutputManifest:
    """`OUTPUT.run.json`, beside an output: the settings that it was begun with and, at the end, its size."""

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.output, self.settings = output, json.loads(json.dumps(settings))
        self.path = Path(f"{output}.run.json")

    def begin(self) -> None:
        """For an output that holds nothing yet."""
        self._write(None)

    def go_on(self) -> int | None:
        """For an output that holds something; returns its size at the end, if that was reached.

        Raises UserError where it was begun with other settings, naming the fields, or not by this command.
        """
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            begun, finished = known["settings"], known["finished_bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"is there already, and no {self.path.name} beside it tells what it was begun with"
            raise UserError(
                f"output_path={self.output}: {what}; choose another name, or remove it"
            ) from error
        names = sorted(
            name for name in begun.keys() | self.settings.keys() if begun.get(name) != self.settings.get(name)
        )
        if names:
            told = ", ".join(
                f"{name}={format_value(begun.get(name))} (now {format_value(self.settings.get(name))})"
                for name in names
            )
            remedy = "give it these again to go on with it, choose another output_path, or remove it"
            raise UserError(f"output_path={self.output}: was begun with {told}; {remedy}")
        return finished

    def finish(self, size: int) -> None:
        self._write(size)

    def _write(self, finished: int | None) -> None:
        with atomic_file(self.path) as file:
            file.write(
                json.dumps({"settings": self.settings, "finished_bytes": finished}, ensure_ascii=False) + "\n"
            )


def cut_back(file: BinaryIO, output: Path) -> tuple[int, int]:
    """Cut off a row that was written in part; returns how many are left and the number of the last one's
    line.
    """
    rows, end, last = 0, 0, b""
    file.seek(0)
    for raw in file:
        if not raw.endswith(b"\n"):
            break
        rows, end, last = rows + 1, end + len(raw), raw
    file.truncate(end)
    file.seek(end)
    try:
        return rows, int(json.loads(last)["line"]) if rows else 0
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"output_path={output}: its row {rows} tells no line of data_path; remove that row, and go on"
        ) from error
