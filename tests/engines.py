"""Engines over a tiny model, and what their samples have said."""

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


def tiny_engine(config: RopeConfig = ISOLATED, kind: type[Engine] = Engine, **limits: int) -> Engine:
    model = tiny_llama()
    patch(model, config)
    return kind(model, tiny_tokenizer(), EngineConfig(**{"cache_tokens": 4096, **limits}))


class Interrupted:
    """A forward pass before whose first computation something happens, as from another thread."""

    def __init__(self, forward: Any, act: Callable[[], object]) -> None:
        self._forward, self._act = forward, act

    def __call__(self, *args: Any) -> Any:
        self._act()
        return self._forward(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)


def step_interrupted(engine: Engine, act: Callable[[], object]) -> list[Event]:
    """A step in which `act` comes when the work has been chosen and nothing is computed yet."""
    forward = engine.runner
    engine.runner = Interrupted(forward, act)  # type: ignore[assignment]
    events = engine.step()
    engine.runner = forward
    return events


def run(engine: Engine) -> list[Event]:
    """All that is said until nothing is left to say."""
    events = []
    while engine.busy:
        events += engine.step()
    return events


def said(events: list[Event]) -> dict[tuple[int, int], list[int]]:
    """The tokens of every (sample, branch)."""
    tokens = defaultdict(list)
    for event in events:
        tokens[event.sample, event.branch] += [] if event.token is None else [event.token]
    return tokens


def answers(engine: Engine, *args: Any, **settings: Any) -> list[list[int]]:
    """What the branches of one sample say, with nobody else about."""
    number = engine.submit(*args, **settings)
    tokens = said(run(engine))
    return [tokens[sample, branch] for sample, branch in sorted(tokens) if sample == number]


def save_random_adapter(folder: Path, base: ModelConfig, seed: int) -> None:
    """An adapter that changes what the tiny model says, as training would."""
    model = tiny_llama()
    patch(model, ISOLATED)
    adapted = add_lora(model, LORA, seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    save_adapter(adapted, tiny_tokenizer(), folder, base, ISOLATED, LORA)


def saved_adapters(root: Path) -> list[Path]:
    """Two adapters of one base, which is there too."""
    base = ModelConfig(base_model=save_tiny(root / "base"))
    for seed in range(2):
        save_random_adapter(root / str(seed), base, seed)
    return [root / "0", root / "1"]
