"""Samples for the page: prompts that the manifest of a served adapter holds."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ValidationError

import parallelmind as pm
from parallelmind.model.manifest import MANIFEST, SAMPLES
from parallelmind.remote import RemotePath
from serving.config import REGISTRY, AppConfig
from serving.observability.log import log
from serving.protocol.branches import BranchesRequest

_MAX_SAMPLES = 20
# For a model without samples of its own.
_DEFAULT: dict[str, Any] = {
    "main": "For lunch Ada likes rice. In the evening Omar plays the piano.\n",
    "branches": [
        {"text": "Question: What does Ada eat for lunch?\nAnswer:", "stop": ["\n"]},
        {"text": "Question: Which instrument does Omar play?\nAnswer:", "stop": ["\n"]},
    ],
}


class SampleList(BaseModel):
    """Samples of one model: bodies of /v1/branches without the model and without settings of the sample."""

    object: str = "list"
    data: list[dict[str, Any]]


def add_samples_route(app: FastAPI, config: AppConfig) -> None:
    @app.get("/v1/samples")
    def samples(model: str) -> SampleList:
        """Samples that the model has learnt to answer."""
        return SampleList(data=page_samples(config, model))


def page_samples(config: AppConfig, model: str) -> list[dict[str, Any]]:
    """The samples of a model. Those that a request cannot hold are left out."""
    location = config.adapter_sources.locate(model)
    if model == config.model.name:
        location = config.model.lora_path
    samples = [] if location is None or location.startswith(REGISTRY) else _saved_samples(location)
    return [sample for sample in samples[:_MAX_SAMPLES] if _is_request(sample)] or [_DEFAULT]


def _saved_samples(location: str) -> list[Any]:
    """What the manifest of an adapter holds; nothing if the manifest cannot be read."""
    try:
        manifest = RemotePath.at(location, "model").child(MANIFEST).read_bytes()
        saved = json.loads(manifest or b"{}").get("extra", {}).get(SAMPLES, [])
    except (OSError, ValueError, AttributeError, pm.UserError) as error:
        log.warning("samples of %s: %s", location, error)
        return []
    return saved if isinstance(saved, list) else []


def _is_request(sample: Any) -> bool:
    try:
        BranchesRequest.model_validate({"model": "", **sample})
    except (ValidationError, TypeError):
        return False
    return True
