"""Samples for the page come from the adapter that is served, and only requests are samples."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from asgi import ingress_app, send_request

from serving.config import AppConfig
from serving.ingress.page_samples import page_samples
from serving.protocol.branches import BranchesRequest

GOOD: dict[str, Any] = {"main": "Facts.", "branches": [{"text": " Who?", "branches": ["a"], "reduce": "b"}]}


def served(folder: Path, samples: Any) -> AppConfig:
    folder.mkdir(parents=True)
    (folder / "parallelmind.json").write_text(json.dumps({"extra": {"samples": samples}}))
    return AppConfig.of({"base_model": "tiny", "lora_path": str(folder), "adapters": {"legal": str(folder)}})


def test_samples_are_those_of_the_adapter(tmp_path: Path) -> None:
    config = served(tmp_path / "law-1" / "adapter", [GOOD])
    assert page_samples(config, config.model.name) == page_samples(config, "base:legal") == [GOOD]
    (default,) = page_samples(config, "base")
    assert default != GOOD
    BranchesRequest(model="base", **default)


@pytest.mark.parametrize("samples", [7, None, [7], [{"branches": []}], [{**GOOD, "surprise": 1}]])
def test_what_is_no_request_is_left_out(samples: Any, tmp_path: Path) -> None:
    config = served(tmp_path / "law-1" / "adapter", samples)
    assert page_samples(config, config.model.name) == page_samples(config, "base")


def test_an_adapter_that_is_gone_has_the_default_sample(tmp_path: Path) -> None:
    config = AppConfig.of({"base_model": "tiny", "lora_path": str(tmp_path / "gone")})
    assert page_samples(config, config.model.name) == page_samples(config, "base")


def test_the_route_takes_a_model(tmp_path: Path) -> None:
    app = ingress_app(tmp_path)
    reply = asyncio.run(send_request(app, path="/v1/samples?model=base"))
    assert (reply.status, len(json.loads(reply.body)["data"])) == (200, 1)
    reply = asyncio.run(send_request(app, path="/v1/samples"))
    assert (reply.status, reply.error["param"]) == (400, "model")
