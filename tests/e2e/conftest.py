"""Fixtures: a server whose model is slow enough for clicks to reach running samples, and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from e2e.browser import Playground, running_browser
from servers import serving
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("site")
    with serving(
        folder / "server", base_model=_save_slow_model(folder / "tiny"), served_name="tiny"
    ) as server:
        yield server.url


def _save_slow_model(folder: Path) -> str:
    """Save a model of about 60 million random weights: some 40 steps a second, and it never ends a text."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as started:
        yield started


@pytest.fixture
def playground(browser: Browser, site: str, request: pytest.FixtureRequest) -> Iterator[Playground]:
    width, height = getattr(request, "param", (1280, 800))
    context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce")
    opened = Playground(context.new_page(), site)
    opened.open()
    yield opened
    context.close()
