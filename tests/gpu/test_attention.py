"""FlexAttention, SDPA and eager on an accelerator give the same logits and gradients, compiled or not."""

from __future__ import annotations

import pytest
import torch
from families import variant
from flexing import SHAPES, flex_always_chosen, gradients, long_batch, real_logits
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.evaluation.probes import check_close, patched
from parallelmind.evaluation.rope_configs import rope_config_grid
from parallelmind.evaluation.tree_law import law_tree
from parallelmind.layout import Tokens, arrange, collate
from parallelmind.model.adapter import add_lora
from parallelmind.model.attention import FLEX_ABOVE, AttentionLogger, _fits_device
from parallelmind.model.inputs import to_tensors
from parallelmind.model.patch import patch
from parallelmind.training.loss import target_loss

LONG = [(1500, (300, 500, 111)), (700, (600, 50))]  # above the threshold, and no whole number of blocks
NAMES = ("shared", "layer types", "complex", "windows beside full attention", "windows in every layer")

names = pytest.mark.parametrize("name", NAMES)
every_mask = pytest.mark.parametrize(
    "config",
    rope_config_grid(visibility=("columnar", "isolated"), align_to=("left", "right")),
    ids=lambda config: f"{config.visibility} {config.align_to}",
)


def shapes(device: str) -> list[tuple[int, tuple[int, ...]]]:
    return LONG if device == "cuda" else SHAPES


def patched_with_adapter(
    model: torch.nn.Module, config: RopeConfig, checkpointing: bool = False
) -> torch.nn.Module:
    patch(model, config)
    if checkpointing:
        model.activation_checkpointing_enable()
    adapted = add_lora(model, LoraConfig(lora_rank=2), seed=0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=random) / 100)
    return adapted.train()


@names
@every_mask
def test_three_attentions_give_the_same_logits(device, name, config):
    batch = long_batch(config, shapes(device), device=device)
    results = {}
    for attention in ("eager", "sdpa"):
        model = variant(name, attention).to(device)
        with patched(model, config):
            results[attention] = real_logits(model, batch, config)
            if attention == "sdpa":
                with flex_always_chosen():
                    results["flex"] = real_logits(model, batch, config)
    check_close(results["sdpa"], results["eager"], "SDPA and eager")
    check_close(results["flex"], results["eager"], "FlexAttention and eager")


@names
@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_three_attentions_give_the_same_gradients(device, name, visibility, checkpointing):
    config = RopeConfig(visibility=visibility)
    batch = long_batch(config, shapes(device), device=device)
    eager, sdpa = (
        patched_with_adapter(variant(name, kind).to(device), config, checkpointing)
        for kind in ("eager", "sdpa")
    )
    expected = gradients(eager, batch, visibility)
    check_close(gradients(sdpa, batch, visibility), expected, "gradients of SDPA and eager", 2e-3)
    with flex_always_chosen():
        check_close(
            gradients(sdpa, batch, visibility), expected, "gradients of FlexAttention and eager", 2e-3
        )


@names
@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
def test_packed_trees_have_the_same_gradients(device, name, visibility):
    """One row of several samples, of which one is a tree."""
    config = RopeConfig(visibility=visibility)
    samples = [law_tree(), Tokens.of([5, 6, 7], [[8, 9, 10, 11], [12, 13]]), law_tree()]
    batch = to_tensors(make_batch(samples, config, pad_id=0, packing=True), device)
    eager, sdpa = (patched_with_adapter(variant(name, kind).to(device), config) for kind in ("eager", "sdpa"))
    expected = gradients(eager, batch, visibility)
    check_close(gradients(sdpa, batch, visibility), expected, "gradients of SDPA and eager", 2e-3)
    with flex_always_chosen():
        check_close(
            gradients(sdpa, batch, visibility), expected, "gradients of FlexAttention and eager", 2e-3
        )


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(14, 2, 64), (28, 4, 128)])
@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
def test_bfloat16_with_heads_of_real_models(device, heads, kv_heads, size, visibility):
    """As in a run: a bfloat16 base, float32 adapters, autocast."""
    config = RopeConfig(visibility=visibility)
    if device == "cpu":  # bfloat16 is slow there
        heads, kv_heads, size = heads // kv_heads, 1, size // 4
    width = {"hidden_size": heads * size, "intermediate_size": 256, "vocab_size": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        count = {"num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        model = LlamaForCausalLM(LlamaConfig(**width, **count, attn_implementation="sdpa")).to(device)
    model = patched_with_adapter(model, config)
    batch = long_batch(config, shapes(device), device=device)
    exact = gradients(model, batch, visibility)
    for name, weight in model.named_parameters():
        if "lora" not in name:
            weight.data = weight.data.to(torch.bfloat16)
    plain = gradients(model, batch, visibility, torch.bfloat16)
    with flex_always_chosen():
        flexible = gradients(model, batch, visibility, torch.bfloat16)
    rough = ((plain - exact).norm() / exact.norm()).item()
    assert rough < 0.1
    assert ((flexible - exact).norm() / exact.norm()).item() < 1.5 * rough + 1e-3


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_loss_is_the_eager_loss(device):
    torch.compiler.reset()
    config = RopeConfig()
    model = patched_with_adapter(variant("windows in every layer", "sdpa").to(device), config)
    batch = long_batch(config, shapes(device), device=device)
    compiled = torch.compile(target_loss, backend="inductor" if device == "cuda" else "aot_eager")
    with flex_always_chosen():
        expected = gradients(model, batch, config.visibility)
        model.zero_grad()
        with torch.compiler.set_stance("default"):
            compiled(model, batch, config.visibility)[0].backward()
    results = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    check_close(results, expected, "gradients of a compiled and an eager loss", 2e-3)


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
def test_new_lengths_do_not_recompile(device, visibility):
    torch.compiler.reset()
    config = RopeConfig(visibility=visibility)
    model = patched_with_adapter(variant("shared", "sdpa").to(device), config)
    graphs = []
    with flex_always_chosen():
        for number in range(8):
            batch = long_batch(config, [(150 + 70 * number, (40 + 9 * number, 33))] * 3, device=device)
            gradients(model, batch, config.visibility)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[3]


def test_two_steps_are_bit_exact(device):
    """A resumed run repeats steps."""
    config = RopeConfig()
    model = patched_with_adapter(variant("shared", "sdpa").to(device), config)
    batch = long_batch(config, shapes(device), device=device)
    with flex_always_chosen():
        first, second = (gradients(model, batch, config.visibility, torch.bfloat16) for _ in range(2))
    assert torch.equal(first, second)


def test_the_choice_is_logged(device):
    config, lines = RopeConfig(), []
    model = variant("shared", "sdpa").to(device)
    batches = [
        collate([arrange(Tokens.of([], [[1] * n]), config)], pad_id=0) for n in (FLEX_ABOVE, FLEX_ABOVE + 1)
    ]
    with patched(model, config):
        list(AttentionLogger(model, torch.bfloat16, lines.append)(batches))
        long = "flex_attention" if _fits_device(model.device, torch.bfloat16) else "sdpa"
    assert lines == [
        f"attention: sdpa for up to {FLEX_ABOVE} tokens",
        f"attention: {long} for up to {2 * FLEX_ABOVE} tokens",
    ]
    assert device == "cuda" or long == "sdpa"
