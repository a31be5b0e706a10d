"""Documents have the same keys and values whatever stands beside them, from memory and from a folder.

Samples of random documents in random orders arrive at one engine. Every sampled token has the logits of one
full forward pass over its tree.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from engines import ISOLATED, decode, saved_adapters, tiny_engine
from families import FAMILIES, variant
from recording import MODELS, RecordingEngine, prompt, run_and_check
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from transformers import PreTrainedModel

import parallelmind as pm
from parallelmind.config import RopeConfig
from parallelmind.data.record_parser import parse_value
from parallelmind.data.tokenise import NO_LIMITS, tokenise
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.request import Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.errors import UserError, UserNotice
from parallelmind.evaluation.probes import patched
from parallelmind.layout import arrange
from parallelmind.model.fingerprint import base_fingerprint
from parallelmind.model.patch import patch

LENGTHS = (1, 5, 16, 21, 40)
DOCUMENTS = [prompt(length, length) for length in LENGTHS]
TREES = RopeConfig(visibility="isolated", positions="time", rope_2d_ratio=0.5)


def submit(engine: RecordingEngine, rng: random.Random, main: list[int], **sampling: Any) -> Any:
    """A sample of some documents in any order, with one or several questions."""
    number = engine.samples.num_submitted
    documents = rng.sample(DOCUMENTS, rng.randint(1, len(DOCUMENTS)))
    branches = [prompt(3, number, 1)] if rng.random() < 0.3 else []
    reduce = prompt(rng.randint(1, 9), number, 2)
    sample = Sample(main, branches, reduce, documents)
    engine.submit(sample, seed=number, max_new_tokens=4, **sampling)
    return engine.samples.groups[number]


def engine_of(model: Any, blocks: int = 64, **settings: Any) -> RecordingEngine:
    return RecordingEngine(
        model, EngineConfig(cache_tokens=blocks * BLOCK, max_prefill_tokens=24), **settings
    )


@pytest.mark.parametrize(
    ("family", "attention"),
    [*MODELS, *((family, "eager") for family in [*FAMILIES, "latent attention"] if family != "shared")],
)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_any_order_gives_the_logits_of_one_forward_pass(
    family: str, attention: str, ratio: float, tmp_path: Path
) -> None:
    rng, model = random.Random(family), variant(family, attention)
    with patched(model, TREES.model_copy(update={"rope_2d_ratio": ratio})):
        for turn in range(2):
            engine = engine_of(model, document_cache=tmp_path)
            groups = [submit(engine, rng, prompt(rng.choice([7, 16]), 0)) for _ in range(3)]
            run_and_check(engine, groups)
            groups = [submit(engine, rng, []) for _ in range(3)]
            run_and_check(engine, groups)
            engine.flush_documents()
            stats = engine.stats()
            assert stats.documents_read if turn else stats.documents_written


def test_a_small_cache_preempts_samples_of_documents(tmp_path: Path) -> None:
    rng, model = random.Random(1), variant("shared", "sdpa")
    with patched(model, TREES):
        for _ in range(2):
            engine = engine_of(model, blocks=14, document_cache=tmp_path)
            groups = [submit(engine, rng, [9, 8, 7]) for _ in range(8)]
            for _ in range(60):
                engine.step()
                running = engine.scheduler.running
                if running and rng.random() < 0.3:
                    engine.scheduler._preempt(running[-1])
            run_and_check(engine, groups)
            engine.flush_documents()
            manager = engine.scheduler.block_manager
            assert manager.num_available == manager.num_blocks
            assert engine.scheduler.num_preemptions


@pytest.mark.parametrize("mains", [([9, 8, 7], [9, 8, 7]), ([], [7]), ([9, 8], [])])
def test_documents_are_found_in_any_order_beside_any_other(mains: tuple[list[int], list[int]]) -> None:
    engine, question = tiny_engine(TREES), [5, 6]
    decode(engine, Sample(mains[0], reduce=question, documents=DOCUMENTS), max_new_tokens=1)
    before = engine.scheduler.num_prefill["document"]
    assert engine.stats().reused_share_by_kind["document"] == 0
    shown = [DOCUMENTS[index] for index in (4, 1, 3)]
    decode(engine, Sample(mains[1], reduce=question, documents=shown), max_new_tokens=1)
    assert engine.scheduler.num_reused["document"] == sum(map(len, shown))
    assert engine.scheduler.num_prefill["document"] - before == sum(map(len, shown))


def test_what_is_rotated_was_computed() -> None:
    """Rotations of rotations would add up their rounding."""
    engine = tiny_engine(TREES)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        documents = [DOCUMENTS[index] for index in order]
        decode(engine, Sample(reduce=[5], documents=documents), max_new_tokens=1)
    assert engine._documents is not None
    computed = [document.start_time for document in engine._documents._computed.values()]
    assert computed == [0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]]
    assert engine.scheduler.num_prefill["document"] - engine.scheduler.num_reused["document"] == sum(
        LENGTHS[:3]
    )


def test_a_document_that_was_evicted_is_computed_again() -> None:
    engine = tiny_engine(TREES, cache_tokens=8 * BLOCK)
    for start in (0, 3, 0):
        sample = Sample(reduce=[5], documents=DOCUMENTS[start:][:3])
        assert decode(engine, sample, max_new_tokens=4) == decode(
            tiny_engine(TREES), sample, max_new_tokens=4
        )


def test_a_model_that_cannot_rotate_finds_documents_at_the_same_place() -> None:
    model = variant("complex")  # its attention has chunks
    with patched(model, TREES):
        engine = engine_of(model)
        for order in ((4, 3), (4, 3), (3, 4)):
            documents = [DOCUMENTS[index] for index in order]
            engine.submit(Sample([9], reduce=[5], documents=documents), max_new_tokens=1)
            while engine.busy:
                engine.step()
        assert engine.scheduler.num_reused["document"] == LENGTHS[4] + LENGTHS[3]


def test_documents_that_arrive_together_in_one_order_are_computed_once() -> None:
    engine = tiny_engine(TREES)
    for main in ([9], [8]):
        engine.submit(Sample(main, reduce=[5], documents=[DOCUMENTS[4], DOCUMENTS[3]]), max_new_tokens=2)
    while engine.busy:
        engine.step()
    assert engine.scheduler.num_reused["document"] == len(DOCUMENTS[4]) + len(DOCUMENTS[3])


def test_another_adapter_finds_no_document_and_another_main_does(tmp_path: Path) -> None:
    folders = saved_adapters(tmp_path / "adapters")
    sample = Sample([9, 8], reduce=[5, 6], documents=DOCUMENTS)
    expected = {}
    for name, folder in zip("ab", folders, strict=True):
        alone = tiny_engine(ISOLATED)
        alone.load_adapter(name, folder)
        expected[name] = decode(alone, sample, adapter=name, max_new_tokens=8)
    for turn in range(2):
        engine = tiny_engine(ISOLATED, document_cache=tmp_path / "documents")
        for name, folder in zip("ab", folders, strict=True):
            engine.load_adapter(name, folder)
            assert decode(engine, sample, adapter=name, max_new_tokens=8) == expected[name]
        assert engine.stats().documents_read == 2 * len(DOCUMENTS) * turn
        assert engine.scheduler.num_reused["document"] == 2 * sum(LENGTHS) * turn
        engine.flush_documents()
    for turn, main in enumerate(([9, 7], [9, 8, 7])):
        engine = tiny_engine(ISOLATED, document_cache=tmp_path / "documents")
        decode(engine, Sample(main, reduce=[5, 6], documents=DOCUMENTS), max_new_tokens=1)
        engine.flush_documents()
        assert engine.stats().documents_read == turn * len(DOCUMENTS)


def test_a_changed_model_finds_no_document(tmp_path: Path) -> None:
    sample, model = Sample([9, 8], reduce=[5, 6], documents=DOCUMENTS), tiny_llama()
    patch(model, ISOLATED)
    for turn in range(2):
        with torch.no_grad():  # one value, as far as possible from those that an adapter's manifest holds
            model.get_submodule("model.layers.0.self_attn.k_proj").weight[3, 5] += turn
        engine = pm.Engine(model, tiny_tokenizer(), EngineConfig(cache_tokens=1024), document_cache=tmp_path)
        decode(engine, sample, max_new_tokens=1)
        engine.flush_documents()
        assert engine.stats().documents_read == 0
    assert len(list(tmp_path.iterdir())) == 2 * len(DOCUMENTS)


def test_quantised_weights_and_their_scales_are_in_the_fingerprint() -> None:
    def quantised(weight: int, scale: float) -> PreTrainedModel:
        model = tiny_llama()
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        layer.weight = nn.Parameter(
            torch.full_like(layer.weight, weight, dtype=torch.int8), requires_grad=False
        )
        layer.register_buffer("scale", torch.tensor(scale))
        return model

    found = {base_fingerprint(quantised(*values)) for values in ((1, 1.0), (2, 1.0), (1, 2.0), (1, 1.0))}
    assert len(found) == 3


def written(folder: Path, documents: list[list[int]] = DOCUMENTS, **settings: Any) -> list[Path]:
    """The files of one sample, which a new engine has written."""
    engine = tiny_engine(ISOLATED, document_cache=folder, **settings)
    decode(engine, Sample([9], reduce=[5, 6], documents=documents), max_new_tokens=1)
    engine.flush_documents()
    return sorted(folder.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def take_another(path: Path) -> None:
    path.write_bytes(next(file for file in sorted(path.parent.iterdir()) if file != path).read_bytes())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(cut, "cannot be read"), (flip, "is damaged"), (take_another, "is not the file of this document")],
)
def test_a_damaged_or_foreign_file_is_refused_computed_and_replaced(
    damage: Any, reason: str, tmp_path: Path
) -> None:
    files = written(tmp_path)
    assert len(files) == len(DOCUMENTS)
    damage(files[2])
    sample = Sample([9], reduce=[5, 6], documents=DOCUMENTS)
    engine = tiny_engine(ISOLATED, document_cache=tmp_path)
    with pytest.warns(UserNotice, match=reason) as notices:
        tokens = decode(engine, sample, max_new_tokens=8)
    assert len(notices) == 1
    assert "\n" not in str(notices[0].message)
    assert tokens == decode(tiny_engine(ISOLATED), sample, max_new_tokens=8)
    engine.flush_documents()
    assert engine.stats().documents_read == len(DOCUMENTS) - 1
    again = tiny_engine(ISOLATED, document_cache=tmp_path)
    decode(again, sample, max_new_tokens=1)
    assert again.stats().documents_read == len(DOCUMENTS)


def test_the_folder_has_a_bounded_size_and_keeps_files_of_others(tmp_path: Path) -> None:
    size = max(file.stat().st_size for file in written(tmp_path / "all"))
    other = tmp_path / "bounded" / "notes.txt"
    other.parent.mkdir()
    other.write_text("x" * 10 * size)
    for document in DOCUMENTS:
        files = written(other.parent, [document], document_cache_bytes=2 * size)
        files.remove(other)
        assert sum(file.stat().st_size for file in files) <= 2 * size
    assert any(file.name.endswith(f"-{LENGTHS[-1]}.safetensors") for file in files)


def test_what_a_killed_writer_left_is_removed_like_an_unused_document(tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in written(tmp_path))
    left = tmp_path / f".{'0' * 32}-5.safetensors.{'1' * 32}.part"
    left.write_bytes(bytes(size))
    os.utime(left, (0, 0))
    written(tmp_path, [prompt(5, 7)], document_cache_bytes=2 * size)
    assert not left.exists()
    assert len(list(tmp_path.iterdir())) == len(LENGTHS) + 1


def test_documents_of_another_user_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setattr(os, "utime", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    engine = tiny_engine(ISOLATED, document_cache=tmp_path)
    decode(engine, Sample([9], reduce=[5, 6], documents=DOCUMENTS), max_new_tokens=1)
    assert engine.stats().documents_read == len(DOCUMENTS)


def test_a_folder_or_model_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"document_cache=.*file: .*; give a folder"):
        tiny_engine(ISOLATED, document_cache=tmp_path / "file")
    with pytest.raises(UserError, match="document_cache_bytes=0: give 1 or more"):
        tiny_engine(ISOLATED, document_cache=tmp_path, document_cache_bytes=0)
    with pytest.raises(UserError, match="needs visibility=isolated and positions=time"):
        tiny_engine(RopeConfig(visibility="columnar"), document_cache=tmp_path)
    with pytest.raises(UserError, match="documents: nothing reads them; give the question as reduce"):
        tiny_engine().submit(Sample("The main", documents=["The passage"], branches=["who"]))
    with pytest.raises(UserError, match="documents='text': give a list of texts"):
        Sample(documents="text", reduce="who?")


@pytest.mark.parametrize("main", ["", "the passage is"])
def test_training_and_decoding_place_documents_alike(main: str) -> None:
    texts, tokenizer = ["who lives in", "the answer is what works"], tiny_tokenizer()
    reduce = {"prompt": " Question: who?", "completion": " the answer"}
    record = parse_value({"main": main, "documents": texts, "reduce": reduce})
    (tokenised,) = tokenise([record], tokenizer, NO_LIMITS)
    assert tokenised.tokens is not None
    trained = arrange(tokenised.tokens, TREES)
    engine = tiny_engine(TREES)
    engine.submit(Sample(main, reduce=reduce["prompt"], documents=texts), max_new_tokens=1)
    while not engine.samples.groups[0].branches[-1].has_started:
        engine.step()
    decoded, count = engine.samples.groups[0].final_layout(), len(engine.samples.groups[0].final_layout().ids)
    for field in ("ids", "segment", "branch", "time", "position"):
        assert np.array_equal(getattr(trained, field)[:count], getattr(decoded, field)), field
    assert set(trained.branch[np.isin(trained.segment, [0, 1, 2])]) == {0}


def test_a_text_reads_the_documents_and_a_later_call_finds_them(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    patch(model, ISOLATED)
    texts, settings = ["who lives in", "the answer is what works"], {"max_new_tokens": 6, "ignore_eos": True}
    (expected,) = pm.generate(model, tokenizer, Sample(reduce=" who?", documents=texts), **settings)
    for question in (" who?", [" who?", " who?"]):
        given = {"documents": texts, "document_cache": tmp_path, **settings}
        answers = pm.generate(model, tokenizer, question, **given)
        assert answers in (expected, [expected, expected])
        events = list(pm.stream(model, tokenizer, question, **given))
        assert "".join(event.text for event in events if event.branch == 2 and not event.sample) == expected
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="the sample has documents; give one of them"):
        pm.generate(model, tokenizer, Sample(reduce="a", documents=texts), documents=texts)
    with pytest.raises(UserError, match="documents='text': give a list of texts"):
        pm.generate(model, tokenizer, "who?", documents="text")
