"""Engines over a tiny model, and the tokens of their samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from parallelmind.config import LoraConfig, ModelConfig, RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.output import Event
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.model.adapter import add_lora, save_adapter
from parallelmind.model.patch import patch

COLUMNAR, ISOLATED = RopeConfig(visibility="columnar"), RopeConfig(visibility="isolated")
LORA = LoraConfig(lora_rank=2)


def tiny_engine(config: RopeConfig = ISOLATED, kind: type[Engine] = Engine, **settings: Any) -> Engine:
    """settings: fields of `EngineConfig`, and of a document cache."""
    model = tiny_llama()
    patch(model, config)
    documents = {name: settings.pop(name) for name in [*settings] if name.startswith("document_cache")}
    return kind(model, tiny_tokenizer(), EngineConfig(**{"cache_tokens": 4096, **settings}), **documents)


class ObservedRunner:
    """A model runner that calls `act` with the arguments of each forward pass before it."""

    def __init__(self, runner: Any, act: Callable[..., object]) -> None:
        self._runner, self._act = runner, act

    def __call__(self, *args: Any) -> Any:
        self._act(*args)
        return self._runner(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def step_interrupted(engine: Engine, act: Callable[[], object]) -> list[Event]:
    """Step the engine; `act` is called after scheduling and before the forward pass."""
    observe(engine, lambda *_: act())
    events = engine.step()
    engine._core._runner = engine.runner
    return events


def observe(engine: Engine, act: Callable[..., object]) -> None:
    """Call `act` with the arguments of each forward pass before it."""
    engine._core._runner = ObservedRunner(engine.runner, act)  # type: ignore[assignment]


def run_to_end(engine: Engine) -> list[Event]:
    """Step the engine until it is idle; returns all events."""
    events = []
    while engine.busy:
        events += engine.step()
    return events


def tokens_by_branch(events: list[Event]) -> dict[tuple[int, int], list[int]]:
    """The tokens of every (sample, branch)."""
    tokens = defaultdict(list)
    for event in events:
        tokens[event.sample, event.branch] += [] if event.token is None else [event.token]
    return tokens


def decode(engine: Engine, *args: Any, **settings: Any) -> list[list[int]]:
    """Tokens of every branch of one sample, decoded alone."""
    sample_id = engine.submit(*args, **settings)
    tokens = tokens_by_branch(run_to_end(engine))
    return [tokens[sample, branch] for sample, branch in sorted(tokens) if sample == sample_id]


def save_random_adapter(
    folder: Path, base: ModelConfig, seed: int, config: RopeConfig = ISOLATED, **settings: Any
) -> None:
    """Save an adapter that changes the tokens of the tiny model. settings: more of `save_adapter`."""
    model = tiny_llama()
    patch(model, config)
    adapted = add_lora(model, LORA, seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    save_adapter(adapted, tiny_tokenizer(), folder, base, config, LORA, **settings)


def saved_adapters(root: Path) -> list[Path]:
    """Save a base model and two adapters of it; returns the adapter folders."""
    base = ModelConfig(base_model=save_tiny(root / "base"))
    for seed in range(2):
        save_random_adapter(root / str(seed), base, seed)
    return [root / "0", root / "1"]
