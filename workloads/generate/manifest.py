"""`OUTPUT.run.json`: the settings that an output was started with, and whether it is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parallelmind.errors import UserError, format_value, translate_write_errors
from parallelmind.model.manifest import MANIFEST, WEIGHTS, fetch_adapter
from parallelmind.remote import is_uri
from parallelmind.storage import atomic_file, expand_home, sha256
from workloads.generate.config import GenerateConfig
from workloads.generate.dataset import InputDataset


def run_settings(config: GenerateConfig, dataset: InputDataset) -> dict[str, Any]:
    """All settings that the rows of an output depend on, by field name."""
    settings = {**config.model.load_kwargs(), **config.sampling.to_kwargs(), "reduce": config.input.reduce}
    for name in ("base_model", "lora_path"):
        if path := settings.get(name):
            settings[name] = f"{path}{_checksum(path)}"
    return {**settings, "data_path": f"{dataset.count()} lines (sha256 {dataset.fingerprint})"}


def _checksum(path: str) -> str:
    """That of a folder or URI which is an adapter or a model of ours, or an adapter of peft; else nothing."""
    folder = fetch_adapter(path) if is_uri(path) else Path(expand_home(path))
    files = [folder / MANIFEST, folder / WEIGHTS]  # a manifest has the checksums of all trained weights
    return next((f" (sha256 {sha256(file)[:12]})" for file in files if file.is_file()), "")


class OutputManifest:
    """Manifest file beside an output. It holds the run's settings and, once complete, the output's size."""

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.output, self.settings = output, json.loads(json.dumps(settings))
        self.path = Path(f"{output}.run.json")

    def create(self) -> None:
        """Write the manifest of an output that is still empty."""
        self._write(finished_bytes=None)

    def check_resumable(self) -> int | None:
        """Compare the manifest of an existing output with this run.

        Returns the size in bytes of a complete output, otherwise None. Raises UserError if the output was
        started with other settings, or if there is no manifest.
        """
        try:
            manifest = json.loads(self.path.read_text(encoding="utf-8"))
            recorded, finished_bytes = manifest["settings"], manifest["finished_bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"output_path={self.output}: already exists, and there is no {self.path.name} beside it with "
                "the settings of its run; choose another name, or remove it"
            ) from error
        recorded["dtype"] = recorded.get("dtype") or "float32"  # what earlier versions computed in by default
        names = sorted(recorded.keys() | self.settings.keys())
        changes = [
            f"{name}={format_value(recorded.get(name))} (now {format_value(self.settings.get(name))})"
            for name in names
            if recorded.get(name) != self.settings.get(name)
        ]
        if changes:
            raise UserError(
                f"output_path={self.output}: was started with {', '.join(changes)}; "
                "restore these values to resume it, choose another output_path, or remove it"
            )
        return finished_bytes

    def mark_finished(self, size: int) -> None:
        """Record that the output is complete with `size` bytes."""
        self._write(finished_bytes=size)

    def _write(self, finished_bytes: int | None) -> None:
        manifest = {"settings": self.settings, "finished_bytes": finished_bytes}
        with translate_write_errors("output_path", self.output), atomic_file(self.path) as file:
            file.write(json.dumps(manifest, ensure_ascii=False) + "\n")
