"""Every causal-LM type of transformers compared with the table in the docs, which is complete."""

from __future__ import annotations

import re
from collections import defaultdict
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from engines import run_to_end
from recording import RecordingEngine, prompt, run_and_check
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.key_rotation import KeyRotation
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.engine.request import Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.errors import UserNotice
from parallelmind.evaluation.laws import LAWS
from parallelmind.evaluation.model_support import COLUMNS, SupportRow, check_model_types
from parallelmind.evaluation.probes import patched
from parallelmind.evaluation.tiny_models import causal_lm_types, tiny_model, tiny_tokenizer

_NOT_ROTATED = {"llama4", "llama4_text", "ministral3"}  # docs/inference.md tells why
_STRIDE = {True: 30, False: 50}  # within a family
DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def documented() -> list[SupportRow]:
    lines = DOCS.read_text(encoding="utf-8").split("| " + " | ".join(COLUMNS) + " |\n")[1].splitlines()[1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        SupportRow(kind, family, held == "yes", reason, tuple(laws.split()))
        for kind, family, held, reason, laws in cells
    ]


def name(row: SupportRow) -> str:
    return row.model_type if row.supported else f"{row.model_type}: {row.reason}"


def cases() -> list[ParameterSet]:
    """Every row. `make test` runs some of each family, `make test-all` the others as well."""
    families: dict[tuple[str, bool], list[SupportRow]] = defaultdict(list)
    for row in documented():
        families[row.family, row.supported].append(row)
    sampled = [row for rows in families.values() for row in rows[:: _STRIDE[rows[0].supported]]]
    return [
        pytest.param(row, marks=() if row in sampled else pytest.mark.full, id=name(row))
        for row in documented()
    ]


@pytest.mark.matrix
@pytest.mark.parametrize("row", cases())
def test_type(row: SupportRow) -> None:
    (checked,) = check_model_types([row.model_type])
    assert checked.cells() == tuple(text.replace("|", "/") for text in row.cells())


@pytest.mark.matrix
@pytest.mark.parametrize("row", cases())
def test_types_that_are_not_compiled_are_listed(row: SupportRow) -> None:
    if not row.supported:
        return
    model = fastest(row.model_type)
    with patched(model, RopeConfig(visibility="isolated")):
        engine = Engine(model, tiny_tokenizer(), EngineConfig(cache_tokens=512))
        engine.submit(Sample([5, 6, 7], [[8], [9, 10]]), max_new_tokens=1)
        engine.step()
        assert isinstance(engine.runner, ModelRunner)
        assert engine.runner.can_compile != (row.model_type in not_compiled())


@pytest.mark.matrix
@pytest.mark.parametrize("row", cases())
def test_documents_of_a_type_are_found_in_another_order(row: SupportRow) -> None:
    if not row.supported:
        return
    model = tiny_model(row.model_type, "eager")
    documents = [prompt(length, length) for length in (1, 5, 21, 40)]
    with patched(model, RopeConfig(visibility="isolated", rope_2d_ratio=0.5)):
        engine = RecordingEngine(model, EngineConfig(cache_tokens=1024))
        for seed, order in enumerate(((0, 1, 2, 3), (3, 1, 2, 0), (2, 3))):
            sample = Sample([9, 8, 7][:seed], reduce=[5, 6], documents=[documents[index] for index in order])
            engine.submit(sample, seed=seed, max_new_tokens=3)
            run_and_check(engine, [engine.samples.groups[seed]])
        can_rotate = row.model_type not in _NOT_ROTATED
        assert (KeyRotation.find(model) is not None) == can_rotate
        assert engine.scheduler.num_reused["document"] >= can_rotate * 2 * (21 + 40)


@pytest.mark.matrix
@pytest.mark.full
@pytest.mark.parametrize("model_type", [row.model_type for row in documented() if row.supported])
def test_a_compiled_type_decodes_the_same_tokens(model_type: str) -> None:
    if model_type in not_compiled():
        pytest.skip("has no kernel to be compiled")
    model = fastest(model_type)
    with patched(model, RopeConfig(visibility="isolated")):
        plain, engine = (Engine(model, tiny_tokenizer(), EngineConfig(cache_tokens=1024)) for _ in range(2))
        expects_failure = model_type in uncompilable()
        notice = pytest.warns(UserNotice, match="decoding runs uncompiled")
        with notice if expects_failure else nullcontext():
            assert engine.warm_up() != expects_failure
        for sample in (
            Sample(list(range(50, 90)), [[5, 6, 7], [8], list(range(100, 120))]),
            Sample([], [[9]]),
        ):
            expected, decoded = (
                (each.submit(sample, max_new_tokens=8, ignore_eos=True, logprobs=0), run_to_end(each))[1]
                for each in (plain, engine)
            )
            assert [event.token for event in decoded] == [event.token for event in expected]
            assert [event.logprob for event in decoded] == pytest.approx(
                [event.logprob for event in expected], abs=1e-3
            )


def uncompilable() -> list[str]:
    words = " ".join(DOCS.read_text(encoding="utf-8").split())
    return re.findall(r"`(\w+)`", words.partition("The compiler fails on ")[2].partition(":")[0])


def fastest(model_type: str) -> PreTrainedModel:
    """A tiny model with the first of these attentions that the type has."""
    for attention in ("sdpa", "flex_attention"):
        with suppress(ValueError):
            return tiny_model(model_type, attention)
    return tiny_model(model_type)


def not_compiled() -> list[str]:
    words = " ".join(DOCS.read_text(encoding="utf-8").split())
    text = words.partition("are not compiled: ")[2].partition(".")[0]
    return re.findall(r"`(\w+)`", text)


def test_the_table_is_complete() -> None:
    assert [row.model_type for row in documented()] == causal_lm_types()
    assert all(row.laws == tuple(LAWS) for row in documented() if row.supported)


def test_nearly_every_rotary_type_is_supported() -> None:
    """Counted among types with rotary embeddings and attention layers only that can be built."""
    families = [row.family for row in documented()]
    held, pooled = sum(row.supported for row in documented()), families.count("pooled")
    assert held / (held + pooled) >= 0.95
    text = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert f"Of the {held + pooled} types that rotate by position" in text
    assert f"and can be built here, {held} support branches" in text
