"""What `hf_compat` relies on in transformers and peft. A failure means that upstream has changed."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import peft
import pytest
import torch
from adapting import ROPE, branch_logits, patched_llama
from tiny import save_tiny, tiny_llama
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import logits_process
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parallelmind.evaluation.tiny_models import tiny_model
from parallelmind.model.hf_compat import (
    AttentionBackend,
    CheckpointedLayer,
    DecodedModel,
    OwnAttention,
    applies_sliding_window,
    attention_name,
    block_class_names,
    compares_attention_name,
    decoder_layers,
    drop_quantization,
    hands_over_masks,
    has_own_attention,
    is_stateful,
    no_load_report,
    process_rows,
    restore_class,
    sharded_loading,
    swap_class,
    undecorated_forward,
    wrap_with_adapter,
)
from parallelmind.model.patch import patch, unpatch

ROOT = Path(__file__).resolve().parents[3]
IDS = torch.arange(3, 13)[None]


def attention_names(model: PreTrainedModel) -> list[str]:
    """Of every configuration in the model, sub-configurations included."""
    top = model.config
    return [top._attn_implementation, *(getattr(top, name)._attn_implementation for name in top.sub_configs)]


# Imports


_IMPORT_EVERYTHING = """
import json, pkgutil, sys, warnings
import huggingface_hub, mlflow, numpy, peft, pyarrow.fs, pydantic, ray.data, tokenizers, torch, transformers
import torch._dynamo, torch.nn.attention.flex_attention, torch.distributed.fsdp, transformers.masking_utils
import transformers.integrations.flex_attention, transformers.modeling_layers, transformers.generation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

def state():
    return {
        "attention": {name: id(function) for name, function in ALL_ATTENTION_FUNCTIONS.items()},
        "masks": {name: id(function) for name, function in ALL_MASK_ATTENTION_FUNCTIONS.items()},
        "dynamo": repr(sorted(torch._dynamo.config.get_config_copy().items())),
        "inductor": repr(sorted(torch._inductor.config.get_config_copy().items())),
        "warnings": [repr(entry) for entry in warnings.filters],
        "torch": [
            str(torch.get_default_dtype()), str(torch.get_default_device()), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
            torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
            torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
        ],
        "verbosity": [transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()],
        "linear": [id(torch.nn.Linear.forward), id(torch.nn.functional.scaled_dot_product_attention)],
    }

torch.manual_seed(0)
before = state()
import parallelmind
modules = [module.name for module in pkgutil.walk_packages(parallelmind.__path__, "parallelmind.")]
for name in modules:
    if not name.endswith("__main__"):
        __import__(name)
after = state()
print(json.dumps([len(modules), [key for key in before if before[key] != after[key]]]))
"""


def test_importing_every_module_changes_nothing_in_other_libraries() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-c", _IMPORT_EVERYTHING]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300)
    count, changed = json.loads(done.stdout.splitlines()[-1])
    assert count > 40
    assert changed == []


# Attention


def test_a_patched_model_leaves_other_models_alone() -> None:
    plain, other = tiny_llama(), patched_llama()
    functions, masks = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    expected = plain(IDS).logits
    types = [type(module) for module in plain.modules()]
    branch_logits(other)
    assert [type(module) for module in plain.modules()] == types
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(plain(IDS).logits, expected)
    for name in ("sdpa", "flex_attention", "eager"):
        assert ALL_ATTENTION_FUNCTIONS.get(name) is functions.get(name)
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is masks[name]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers.")
    assert ALL_ATTENTION_FUNCTIONS["flex_attention"].__module__.startswith("transformers.")


@pytest.mark.parametrize("original", ["sdpa", "flex_attention"])
def test_the_names_of_our_own_have_the_masks_of_the_originals(original: str) -> None:
    model = tiny_model("llama", original)
    with OwnAttention(model):
        own = model.config._attn_implementation
        assert own not in ("sdpa", "flex_attention")
        assert ALL_MASK_ATTENTION_FUNCTIONS[own] is ALL_MASK_ATTENTION_FUNCTIONS[original]
        assert model.get_correct_attn_implementation(own) == own
        assert attention_name(model) == original
    assert model.config._attn_implementation == original


@pytest.mark.parametrize("model_type", ["llama", "gemma3", "gemma3_text", "qwen2"])
def test_patch_switches_the_attention_of_text_layers_and_unpatch_restores_it(model_type: str) -> None:
    model = tiny_model(model_type, "sdpa")
    before, config = attention_names(model), model.config.to_dict()
    patch(model, ROPE)
    layers = [module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "config")]
    text = [layer for layer in layers if "vision" not in type(layer.config).__name__.lower()]
    assert text
    assert {layer.config._attn_implementation for layer in text} == {"parallelmind_sdpa"}
    others = [layer for layer in layers if layer not in text]
    assert {layer.config._attn_implementation for layer in others} <= {"sdpa"}
    assert model.config.to_dict() == config
    unpatch(model)
    assert attention_names(model) == before
    assert "own_attention" not in " ".join(vars(model))


def test_a_saved_configuration_does_not_hold_the_name(tmp_path: Path) -> None:
    model = patched_llama()
    assert has_own_attention(model)
    model.save_pretrained(tmp_path)
    assert "parallelmind" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert "parallelmind" not in json.dumps(loaded.config.to_diff_dict(), default=str)


def test_a_copy_of_a_patched_model_is_unpatched_by_itself() -> None:
    model = patched_llama()
    expected = branch_logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(branch_logits(twin), expected)
    unpatch(twin)
    assert attention_names(twin) == ["sdpa"]
    assert has_own_attention(model)
    assert torch.equal(branch_logits(model), expected)
    assert torch.equal(twin(IDS).logits, tiny_llama()(IDS).logits)


def test_set_attn_implementation_of_a_patched_model_is_kept() -> None:
    model = patched_llama()
    expected = branch_logits(model)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert not has_own_attention(model)
        torch.testing.assert_close(branch_logits(model), expected, rtol=1e-4, atol=1e-4)
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_generate_with_a_patched_model_is_that_of_the_plain_one() -> None:
    model = tiny_llama()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    padded = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    attention_mask = (padded != 0).long()

    def generated() -> list[torch.Tensor]:
        return [
            model.generate(IDS, **options),
            model.generate(padded, attention_mask=attention_mask, **options),
            model.generate(IDS, cache_implementation="static", **options),
        ]

    expected = generated()
    patch(model, ROPE.model_copy(update={"rope_2d_ratio": 0.0}))
    assert all(torch.equal(*pair) for pair in zip(generated(), expected, strict=True))


def test_acquired_twice_it_is_restored_by_the_last_release() -> None:
    model = tiny_llama()
    first, second = OwnAttention(model), OwnAttention(model)
    first.acquire()
    second.acquire()
    first.release()
    assert has_own_attention(model)
    second.release()
    assert not has_own_attention(model)


def test_threads_that_acquire_and_release_leave_the_original_name() -> None:
    model = tiny_llama()
    broken: list[str] = []

    def work() -> None:
        attention = OwnAttention(model)
        for _ in range(200):
            with attention:
                if not has_own_attention(model):
                    broken.append("released beneath its user")

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert broken == []
    assert model.config._attn_implementation == "sdpa"


def test_a_backend_is_passed_through_to_every_layer() -> None:
    model = patched_llama()
    seen = []

    class Recorder(AttentionBackend):
        def attend(self, query: torch.Tensor, *args: Any) -> torch.Tensor:
            seen.append((query.shape, *args[2:]))
            return query.transpose(1, 2)

    mask = Recorder(IDS.shape[1])
    assert create_causal_mask(model.config, torch.zeros(1, 10, 64), mask, None) is mask
    model(input_ids=IDS, attention_mask=mask, use_cache=False)
    assert seen == [((1, 4, 10, 16), 16**-0.5, None, None)] * 2


def test_flex_attention_adds_the_score_bias() -> None:
    parameters = inspect.signature(flex_attention_forward).parameters
    assert parameters["position_bias"].default is None
    source = inspect.getsource(flex_attention_forward)
    assert "score + position_bias[batch_idx, head_idx, q_idx, kv_idx]" in source
    assert source.count("position_bias") == 3  # the parameter, the test for None, the index


def test_the_recompile_limit_of_dynamo_is_as_before_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallelmind.model import hf_compat

    model, limits = patched_llama(), []
    default = torch._dynamo.config.recompile_limit

    def record(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        limits.append(torch._dynamo.config.recompile_limit)
        return query.transpose(1, 2), None

    monkeypatch.setattr(hf_compat, "flex_attention_forward", record)
    mask = BlockMask.from_kv_blocks(
        torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    )
    model(input_ids=IDS, attention_mask=mask, use_cache=False)
    assert limits == [64, 64]
    assert torch._dynamo.config.recompile_limit == default


def test_models_that_compute_with_the_mask_are_recognised() -> None:
    assert hands_over_masks(tiny_model("llama", "sdpa"))
    assert not hands_over_masks(tiny_model("llama", "eager"))
    assert not hands_over_masks(tiny_model("glm_moe_dsa", "sdpa"))  # _supports_flex_attn
    assert not hands_over_masks(tiny_model("gptj"))  # no ALL_ATTENTION_FUNCTIONS
    assert isinstance(PreTrainedModel._supports_flex_attn, bool)


@pytest.mark.parametrize(("model_type", "expected"), [("llama", False), ("gemma4_text", True)])
def test_models_that_compare_the_name_keep_it(model_type: str, expected: bool) -> None:
    model = tiny_model(model_type, "sdpa")
    assert compares_attention_name(model) == expected
    patch(model, ROPE)
    assert has_own_attention(model) != expected


# Classes


def test_a_swapped_class_keeps_name_and_state() -> None:
    class Mixin(torch.nn.Module):
        pass

    module = tiny_llama().model.rotary_emb
    own_class, state = type(module), module.inv_freq
    swap_class(module, Mixin)
    assert isinstance(module, Mixin)
    assert isinstance(module, own_class)
    assert (type(module).__name__, type(module).__module__) == (own_class.__name__, own_class.__module__)
    assert module.inv_freq is state
    assert restore_class(module)
    assert type(module) is own_class
    assert not restore_class(module)


def test_the_length_trigger_is_a_decorator() -> None:
    rotary = type(tiny_llama().model.rotary_emb)
    assert hasattr(rotary.forward, "__wrapped__")
    plain = undecorated_forward(rotary)
    assert list(inspect.signature(plain).parameters)[:3] == ["self", "x", "position_ids"]
    assert "dynamic" not in inspect.getsource(plain).partition("def forward")[2]


def test_a_layer_takes_its_checkpoint_function_from_itself() -> None:
    model = tiny_llama().train()
    layer = model.model.layers[0]
    assert isinstance(layer, GradientCheckpointingLayer)
    swap_class(layer, CheckpointedLayer)
    called = []
    layer._gradient_checkpointing_func = lambda function, *args: called.append(1) or function(*args)
    layer.gradient_checkpointing = True
    model(IDS)
    assert called == [1]
    model.activation_checkpointing_enable()
    assert "_gradient_checkpointing_func" in vars(layer)


# Structure


def test_sliding_windows_are_applied_by_the_modules_that_import_their_mask() -> None:
    assert applies_sliding_window(tiny_model("mistral").model)
    assert not applies_sliding_window(tiny_llama().model)


def test_layers_are_found_by_their_class() -> None:
    model = tiny_llama()
    assert decoder_layers(model) == list(model.model.layers)


def test_recurrent_models_say_so() -> None:
    assert is_stateful(tiny_model("mamba"))
    assert not is_stateful(tiny_llama())


def test_models_name_the_classes_of_their_layers() -> None:
    model = tiny_llama()
    assert block_class_names(model) == {type(model.model.layers[0]).__name__}
    assert block_class_names(torch.nn.Linear(1, 1)) == set()  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_the_head_runs_on_hidden_states_alone(model_type: str) -> None:
    model = tiny_model(model_type)
    hidden = next(iter(model.children()))(IDS, use_cache=False).last_hidden_state
    logits = type(model).forward(DecodedModel(model, hidden), input_ids=None).logits
    torch.testing.assert_close(logits, model(IDS).logits)


# Loading and wrapping


def test_a_model_without_quantization_can_be_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gguf"}
    model.hf_quantizer = object()
    drop_quantization(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_peft_wraps_without_a_warning() -> None:
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model_type in ("llama", "gpt2"):
            model = tiny_model(model_type)
            adapted = wrap_with_adapter(model, copy.copy(settings), "default")
            assert adapted.get_base_model() is model
            assert wrap_with_adapter(adapted, copy.copy(settings), "second") is adapted
            assert set(adapted.peft_config) == {"default", "second"}


def test_the_load_report_is_hidden_unless_a_conversion_failed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, tie_word_embeddings=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    logger, records = logging.getLogger("transformers.modeling_utils"), []
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    with no_load_report():
        AutoModelForCausalLM.from_pretrained(folder)
        logger.warning("LOAD REPORT with a failed CONVERSION")
        logger.warning("another")
    assert [record.getMessage() for record in records] == ["LOAD REPORT with a failed CONVERSION", "another"]
    AutoModelForCausalLM.from_pretrained(folder)
    logger.removeHandler(handler)
    assert "LOAD REPORT" in records[-1].getMessage()


# Sampling


@pytest.mark.parametrize(
    ("processor", "attribute", "values"),
    [
        (logits_process.TemperatureLogitsWarper, "temperature", [0.5, 1.0, 3.0]),
        (logits_process.TopPLogitsWarper, "top_p", [0.2, 0.6, 1.0]),
        (logits_process.MinPLogitsWarper, "min_p", [0.02, 0.3, 1.0]),
        (logits_process.RepetitionPenaltyLogitsProcessor, "penalty", [0.5, 1.0, 3.0]),
    ],
)
def test_logits_processors_take_a_number_for_each_row(processor, attribute: str, values: list[float]) -> None:
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 3
    input_ids = torch.tensor([[1, 2], [3, 3], [5, 39]])
    expected = [processor(value)(input_ids[row, None], scores[row, None]) for row, value in enumerate(values)]
    processed = process_rows(processor, attribute, torch.tensor(values), scores, input_ids)
    torch.testing.assert_close(processed, torch.cat(expected))


# Loading


@pytest.fixture
def one_process() -> Iterator[DeviceMesh]:
    """The mesh of a process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_loading_in_shards_gives_the_weights_and_buffers_of_loading(
    tmp_path: Path, one_process: DeviceMesh
) -> None:
    expected = tiny_llama(tie_word_embeddings=True)
    expected.save_pretrained(tmp_path)
    with sharded_loading(one_process, whole_embeddings=False):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in model.named_parameters():
        assert torch.equal(weight.full_tensor(), expected.get_parameter(name))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected.get_buffer(name))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight) is torch.nn.Parameter


def test_loading_in_shards_refuses_pickles(tmp_path: Path, one_process: DeviceMesh) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with (
        sharded_loading(one_process, whole_embeddings=False),
        pytest.raises(ValueError, match="sharding=full .* these are pickles"),
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
