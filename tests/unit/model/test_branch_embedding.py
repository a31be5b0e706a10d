"""Embeddings of branches are added to their tokens, and belong to an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from added import attach_by_copy, save_two
from engines import decode, run_to_end, tokens_by_branch
from flexing import long_batch, real_logits
from peft import PeftModel
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from torch import Tensor, nn

from parallelmind.config import LoraConfig, ModelConfig, RopeConfig, TrainConfig, resolve
from parallelmind.engine.decoding_check import CHECK_SAMPLE, CHECK_TREE, decoding_distance
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.errors import UserError
from parallelmind.evaluation.probes import ROUNDING_TOLERANCE
from parallelmind.model.adapter import (
    add_lora,
    load_adapter,
    load_model_with_lora,
    resume_adapter,
    save_adapter,
)
from parallelmind.model.base_identity import base_identity
from parallelmind.model.branch_embedding import NAME, BranchEmbedding
from parallelmind.model.export import export
from parallelmind.model.mask import attention_masks
from parallelmind.model.patch import patch, unpatch

ROPE = RopeConfig(branch_embeddings=2)
PLAIN = RopeConfig()
LORA = LoraConfig(lora_rank=2)
SAMPLE = Sample(list(range(50, 60)), [[5, 6, 7], [8], [9, 4]])


def patched(rope: RopeConfig = ROPE) -> Any:
    model = tiny_llama()
    patch(model, rope)
    return model


def weight(model: nn.Module) -> nn.Parameter:
    """The embeddings that are trained."""
    (found,) = (w for name, w in model.named_parameters() if NAME in name and w.requires_grad)
    return found


@torch.no_grad()
def embedding(seed: int = 0, rope: RopeConfig = ROPE) -> PeftModel:
    """A model with an adapter whose embeddings are all different, and whose LoRA changes nothing."""
    adapted = add_lora(patched(rope), LORA, seed)
    weight(adapted).normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    return adapted


def logits(model: nn.Module, rope: RopeConfig = ROPE) -> Tensor:
    return real_logits(model.eval(), long_batch(rope), rope)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in `base`, and two adapters in `0` and `1`."""
    return save_two(tmp_path_factory.mktemp("embeddings"), embedding, ROPE, LORA)


def test_a_branch_gets_the_embedding_of_its_number() -> None:
    module = BranchEmbedding(2, 3, stride=16, device=torch.device("cpu"))
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    rows = [[0.0, 0, 0], [1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 6]]
    assert module(torch.arange(0, 80, 16)).tolist() == rows


def test_new_embeddings_change_nothing() -> None:
    adapted = add_lora(patched(), LORA, seed=0)
    assert torch.equal(logits(adapted), logits(patched(PLAIN), PLAIN))
    assert weight(adapted).shape == (2, adapted.config.hidden_size)


def test_embeddings_change_branches_and_not_main() -> None:
    changed = (logits(embedding()) - logits(patched(PLAIN), PLAIN)).abs().amax(-1)
    batch = long_batch(ROPE)
    own = batch.pos2d[batch.segment >= 0][:, 0]
    assert (changed[own == 0] == 0).all()
    assert (changed[own > 0] > 1e-3).all()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(embedding().eval()(input_ids=ids).logits, patched()(input_ids=ids).logits)


@pytest.mark.parametrize("sample", [CHECK_SAMPLE, CHECK_TREE], ids=["flat", "tree"])
def test_decoding_computes_what_training_does(sample: Sample) -> None:
    assert decoding_distance(embedding().eval(), tiny_tokenizer(), ROPE, sample) <= ROUNDING_TOLERANCE


def test_an_adapter_keeps_its_embeddings(folder: Path) -> None:
    loaded, _ = load_model_with_lora(lora_path=folder / "0")
    assert torch.equal(logits(loaded), logits(embedding()))
    resumed = resume_adapter(patched(), tiny_tokenizer(), folder / "0", LORA)
    assert torch.equal(weight(resumed), weight(embedding()))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(patched(PLAIN), PLAIN))
    with pytest.raises(UserError, match=r"branch_embeddings=0: the adapter has branch_embeddings=2"):
        load_model_with_lora(lora_path=folder / "0", branch_embeddings=0)


def test_samples_of_several_adapters_have_their_own_embeddings(folder: Path) -> None:
    def engine(model: Any) -> Engine:
        return Engine(model, tiny_tokenizer(), EngineConfig(cache_tokens=1024))

    settings: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
    models = [load_adapter(patched(), tiny_tokenizer(), folder / name) for name in "01"]
    expected = [decode(engine(model), SAMPLE, **settings) for model in (*models, patched())]
    assert len({str(tokens) for tokens in expected}) == 3
    shared = engine(patched())
    for name in "01":
        shared.load_adapter(name, folder / name)
    samples = [shared.submit(SAMPLE, adapter=name, **settings) for name in ("0", "1", "base", "0")]
    tokens = tokens_by_branch(run_to_end(shared))
    decoded = [[tokens[sample, branch] for branch in range(3)] for sample in samples]
    assert decoded == [expected[index] for index in (0, 1, 2, 0)]


def test_a_text_does_not_take_the_keys_of_a_branch_with_an_embedding() -> None:
    """An independent branch caches keys, which have its embedding; the same tokens in main have none."""
    model = embedding(rope=ROPE.model_copy(update={"rope_2d_ratio": 0.0})).eval()
    document, question = list(range(40, 77)), list(range(100, 121))
    settings: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}

    def decoded(engine: Engine, main: list[int], branch: list[int]) -> list[list[int]]:
        sample = tokenize_request(tiny_tokenizer(), Sample(main, [branch]), None, None, settings)
        engine.enqueue(replace(sample, branch_number=1))
        return list(tokens_by_branch(run_to_end(engine)).values())

    used, fresh = (Engine(model, tiny_tokenizer(), EngineConfig(cache_tokens=1024)) for _ in range(2))
    decoded(used, document, question)
    assert decoded(used, document + question, [9]) == decoded(fresh, document + question, [9])
    assert decoded(used, document, question) == decoded(fresh, document, question)


def test_embeddings_of_tokens_may_be_given() -> None:
    adapted, batch = embedding().eval(), long_batch(ROPE)
    mask = attention_masks(adapted, batch.placement, ROPE.visibility, batch.is_flat)
    settings = {"attention_mask": mask, "position_ids": batch.position, "pos2d": batch.pos2d}
    with torch.no_grad():
        vectors = adapted.get_input_embeddings()(batch.ids)
        given = adapted(inputs_embeds=vectors, **settings).logits
        assert torch.equal(given, adapted(input_ids=batch.ids, **settings).logits)


def test_an_adapter_without_embeddings_of_its_own_is_not_saved(tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(patched(), settings)
    with pytest.raises(UserError, match=r'modules_to_save=\["branch_embedding"\]'):
        save_adapter(adapted, tiny_tokenizer(), tmp_path / "adapter", ModelConfig(base_model="tiny"))


def test_several_adapters_are_attached_and_deleted(folder: Path) -> None:
    model = patched()
    for name in ("v0", "v1"):
        model = attach_by_copy(model, folder / name[1:], name)
    model.set_adapter("v0")
    assert torch.equal(logits(model), logits(embedding(0)))
    model.delete_adapter("v0")
    model.set_adapter("v1")
    assert torch.equal(logits(model), logits(embedding(1)))


def test_unpatch_removes_the_embeddings() -> None:
    model, expected = patched(), tiny_llama()
    assert base_identity(model, tiny_tokenizer()) == base_identity(expected, tiny_tokenizer())
    unpatch(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in expected.named_modules()]
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"visibility": "isolated"}, "needs visibility=columnar; set it, or branch_embeddings=0"),
        ({"patch_rope": False}, "needs patch_rope=true; set it, or branch_embeddings=0"),
        ({"tuning": "full"}, "set 0, or drop tuning=full"),
        ({"sharding": "full"}, "set 0, or drop sharding=full"),
        ({"add_tokens": ["<new>"]}, "drop one of them"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_hold_embeddings_is_refused(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(UserError, match=rf"branch_embeddings=8: .*{remedy}"):
        resolve(TrainConfig, {"data_path": "x", "branch_embeddings": 8, **settings})


def test_only_a_lone_branch_is_exported(tmp_path: Path) -> None:
    rope = ROPE.model_copy(update={"rope_2d_ratio": 0.0})
    base = ModelConfig(base_model=save_tiny(tmp_path / "base"))
    save_adapter(embedding(rope=rope), tiny_tokenizer(), tmp_path / "adapter", base, rope, LORA)
    with pytest.raises(UserError, match=r"branch_embeddings=2, and plain weights .*\(lone=true\)"):
        export(tmp_path / "adapter", tmp_path / "merged")
    export(tmp_path / "adapter", tmp_path / "lone", lone=True)
