"""What several files of unit tests begin with."""

from __future__ import annotations

import pytest
from tiny import save_tiny

from parallelmind.config import ModelConfig


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A tiny model on disk, which no test changes."""
    return ModelConfig(base_model=save_tiny(tmp_path_factory.mktemp("base")))
