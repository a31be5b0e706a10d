"""The size of the KV cache: its limit, and its growth up to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import COLUMNAR, ISOLATED, run_to_end, tiny_engine

from parallelmind.engine import model_runner
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample

FREE = 1 << 24


def cgroup(folder: Path, **files: object) -> Path:
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")
    return folder


def test_free_memory_respects_the_limit_of_a_cgroup(tmp_path: Path) -> None:
    stat = "anon 5000\ninactive_file 300\nactive_file 40"
    assert model_runner._free_memory(cgroup(tmp_path, max=10_000, current=6_000, stat=stat)) == 4_340
    assert model_runner._free_memory(cgroup(tmp_path, max="max")) > 1 << 20
    assert model_runner._free_memory(cgroup(tmp_path, max=1 << 62)) < 1 << 50  # the machine has less
    assert model_runner._free_memory(tmp_path / "none") > 1 << 20


def test_engines_on_one_machine_divide_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "_free_memory", lambda _: FREE)
    engine = tiny_engine(ISOLATED)
    whole, part = (
        Engine(engine.model, engine.tokenizer, num_engines=count).config.cache_tokens for count in (1, 4)
    )
    size = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads of 16 floats
    assert (whole, part) == (FREE // 2 // size, FREE // 8 // size)


def test_the_cache_grows_by_half_but_not_beyond_its_limit() -> None:
    engine = tiny_engine(COLUMNAR, cache_tokens=112)  # where prompts of branches are not cached
    slots = []
    for length in (40, 56, 72):
        engine.submit(Sample([], [list(range(50, 50 + length))]), max_new_tokens=2, ignore_eos=True)
        run_to_end(engine)
        slots.append(max(layer.num_slots() for layer in engine.runner.cache.layers))  # type: ignore[union-attr]
    assert slots == [48, 72, 108]
    engine.submit(Sample([], [list(range(50, 159))]), max_new_tokens=2, ignore_eos=True)
    run_to_end(engine)
    assert max(layer.num_slots() for layer in engine.runner.cache.layers) == 112  # type: ignore[union-attr]
