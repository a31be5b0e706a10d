"""How large a pool of keys and values may grow, and that it grows no larger."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import ISOLATED, run, tiny_engine

from parallelmind.engine import model_runner as forward
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample

FREE = 1 << 24


def container(folder: Path, **files: object) -> Path:
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")
    return folder


def test_a_containers_limit_counts_where_there_is_one(tmp_path: Path) -> None:
    stat = "anon 5000\ninactive_file 300\nactive_file 40"
    assert forward._free_memory(container(tmp_path, max=10_000, current=6_000, stat=stat)) == 4_340
    assert forward._free_memory(container(tmp_path, max="max")) > 1 << 20
    assert forward._free_memory(container(tmp_path, max=1 << 62)) < 1 << 50  # the machine has less
    assert forward._free_memory(tmp_path / "none") > 1 << 20


def test_engines_that_share_a_memory_have_a_part_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_free_memory", lambda _: FREE)
    made = tiny_engine(ISOLATED)
    whole, part = (
        Engine(made.model, made.tokenizer, num_engines=count).config.cache_tokens for count in (1, 4)
    )
    size = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads of 16 floats
    assert (whole, part) == (FREE // 2 // size, FREE // 8 // size)


def test_a_pool_grows_in_leaps_but_not_beyond_its_limit() -> None:
    engine = tiny_engine(ISOLATED, cache_tokens=112)
    slots = []
    for length in (40, 56, 72):
        engine.submit(Sample([], [list(range(50, 50 + length))]), max_new_tokens=2, ignore_eos=True)
        run(engine)
        slots.append(max(layer.num_slots() for layer in engine.runner.cache.layers))  # type: ignore[union-attr]
    assert slots == [48, 72, 108]
    engine.submit(Sample([], [list(range(50, 159))]), max_new_tokens=2, ignore_eos=True)
    run(engine)
    assert max(layer.num_slots() for layer in engine.runner.cache.layers) == 112  # type: ignore[union-attr]
