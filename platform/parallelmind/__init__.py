"""Branch-parallel language models: train, sweep, track and serve them on Ray.

The public names load on first use, so that `import parallelmind.config` stays fast.
"""

from __future__ import annotations

import logging
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from parallelmind.errors import UserError

if TYPE_CHECKING:
    from parallelmind.config import RopeConfig, TrainConfig
    from parallelmind.data.tree_batch import tree_batch
    from parallelmind.engine.engine import Engine
    from parallelmind.engine.generate import generate, generate_text, stream
    from parallelmind.engine.output import Event
    from parallelmind.engine.request import Sample, Segment
    from parallelmind.engine.sampling_params import SamplingParams
    from parallelmind.engine.scheduler import EngineConfig
    from parallelmind.model.adapter import load_model_with_lora, save_adapter
    from parallelmind.model.patch import patch
    from parallelmind.model.patch_state import rope_config
    from parallelmind.programs import train

# transformers and peft import bitsandbytes where it is installed, which warns on some CPUs that it lacks an
# optional kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

try:
    __version__ = version("parallelmind")
except PackageNotFoundError:  # run from the source tree, as `ray job submit` does
    __version__ = "source"

__all__ = [
    "Engine",
    "EngineConfig",
    "Event",
    "RopeConfig",
    "Sample",
    "SamplingParams",
    "Segment",
    "TrainConfig",
    "UserError",
    "generate",
    "generate_text",
    "load_model_with_lora",
    "patch",
    "rope_config",
    "save_adapter",
    "stream",
    "train",
    "tree_batch",
]

_HOMES = {
    "Engine": "parallelmind.engine.engine",
    "EngineConfig": "parallelmind.engine.scheduler",
    "Event": "parallelmind.engine.output",
    "RopeConfig": "parallelmind.config",
    "Sample": "parallelmind.engine.request",
    "SamplingParams": "parallelmind.engine.sampling_params",
    "Segment": "parallelmind.engine.request",
    "TrainConfig": "parallelmind.config",
    "generate": "parallelmind.engine.generate",
    "generate_text": "parallelmind.engine.generate",
    "load_model_with_lora": "parallelmind.model.adapter",
    "patch": "parallelmind.model.patch",
    "rope_config": "parallelmind.model.patch_state",
    "save_adapter": "parallelmind.model.adapter",
    "stream": "parallelmind.engine.generate",
    "train": "parallelmind.programs",
    "tree_batch": "parallelmind.data.tree_batch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        similar = get_close_matches(name, __all__, n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise AttributeError(f"module 'parallelmind' has no attribute {name!r}{hint}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
