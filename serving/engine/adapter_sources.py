"""Where adapters are, which version is the newest there, and how it is fetched. All calls may block."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import parallelmind as pm
from parallelmind.model.manifest import MANIFEST, fetch_adapter
from parallelmind.remote import RemotePath
from serving.config import REGISTRY, AdaptersConfig, registered_name


class AdapterVersion(NamedTuple):
    """A version of an adapter. id: identifies its content.

    fetch: returns its folder on this machine, given an empty folder to download into. Raises UserError for an
    adapter that cannot be read or is too large.
    """

    id: str
    fetch: Callable[[Path], Path]


def find_newest(config: AdaptersConfig, model: str) -> AdapterVersion:
    """The newest version of the adapter with this name. Raises UserError if there is none."""
    location = config.locate(model)
    if location is None:
        raise pm.UserError(f"model={model!r}: not served here; /v1/models lists the models")
    if location.startswith(REGISTRY):
        return _find_registered(config, model, location)
    folder = RemotePath.at(location, "model")
    manifest = folder.child(MANIFEST).read_bytes()

    def fetch(_: Path) -> Path:
        _require_size(config, model, folder.total_bytes())
        return fetch_adapter(location)

    return AdapterVersion(sha256(manifest).hexdigest() if manifest else "", fetch)


def _find_registered(config: AdaptersConfig, model: str, location: str) -> AdapterVersion:
    from parallelmind import tracking

    uri = config.mlflow_uri or ""
    version, source = tracking.find_model_version(uri, location)

    def fetch(scratch_dir: Path) -> Path:
        _require_size(config, model, tracking.artifact_bytes(uri, source))
        return tracking.download_artifact(uri, source, scratch_dir)

    return AdapterVersion(version, fetch)


def _require_size(config: AdaptersConfig, model: str, size: int) -> None:
    if size > config.max_adapter_bytes:
        raise pm.UserError(
            f"model={model!r}: its adapter has {size} bytes, {config.max_adapter_bytes} allowed; "
            "raise max_adapter_bytes, or train a lower rank"
        )


def version_name(config: AdaptersConfig, model: str, version: str) -> str | None:
    """The name in the registry of one version of a model. None for folders, which keep no old version."""
    location = config.locate(model) or ""
    return f"{REGISTRY}{registered_name(location)}/{version}" if location.startswith(REGISTRY) else None
