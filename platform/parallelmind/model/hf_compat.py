"""Uses of transformers and peft that go beyond their documented interfaces.

Every function and class names what it relies on. `tests/unit/model/test_hf_compat.py` has a test for each,
which fails when a new version of either library no longer behaves that way.

Nothing here runs on import. Only models that are patched or decoded by the engine are changed.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from threading import Lock
from typing import Any, cast

import peft
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessor
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flex_attention_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging
from transformers.utils.generic import TransformersKwargs

from parallelmind.model import step_ops
from parallelmind.model.forward_context import checkpoint_with_context
from parallelmind.model.shards import shard_parameters
from parallelmind.model.structure import decoder_name, text_modules
from parallelmind.progress import DelayedBar

SDPA, FLEX, EAGER = "sdpa", "flex_attention", "eager"
SCORE_BIAS = "score_bias"  # attribute of a BlockMask: added to the scores of visible pairs

_OWN_NAMES = {SDPA: "parallelmind_sdpa", FLEX: "parallelmind_flex_attention"}
_ORIGINAL_NAMES = {own: original for original, own in _OWN_NAMES.items()}
_USERS = "_own_attention_users"
_RECOMPILE_LIMIT = 64
_FLEX_HONOURS = ("scaling", "dropout", "softcap", "s_aux", "kernel_options")
# Arguments of attention functions that are without effect beside a mask, on the results that are used here.
_WITHOUT_EFFECT = frozenset(TransformersKwargs.__annotations__) | {
    "cache_position",
    "sliding_window",
    "use_cache",
}
_lock = Lock()


# Classes of modules


def swap_class(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Turn `module` into an instance of a generated subclass of (`mixin`, its own class).

    Relies on: assigning `__class__`, which keeps parameters, buffers, hooks and names. Code that looks for
    modules by class name still finds them, since the subclass has its parent's name. The subclass also has
    the parent's forward as `_undecorated_forward`.
    """
    module.__class__ = _swapped_class(mixin, type(module))  # type: ignore[arg-type, assignment, unused-ignore]


def restore_class(module: nn.Module) -> bool:
    """Undo `swap_class`. Returns False for a module whose class was not swapped."""
    own_class = type(module).__dict__.get("_own_class")
    if own_class is None:
        return False
    module.__class__ = own_class
    return True


@cache
def _swapped_class(mixin: type[nn.Module], own_class: type[nn.Module]) -> type[nn.Module]:
    body = {
        "__module__": own_class.__module__,
        "__qualname__": own_class.__qualname__,
        "_own_class": own_class,
        "_undecorated_forward": undecorated_forward(own_class),
    }
    return type(own_class.__name__, (mixin, own_class), body)


def undecorated_forward(module_class: type[nn.Module]) -> Callable[..., Any]:
    """The `forward` of a rotary class without `dynamic_rope_update`, which changes frequencies by length.

    Relies on: the decorator sets `__wrapped__`.
    """
    return inspect.unwrap(module_class.forward)


class CheckpointedLayer(nn.Module):
    """Mixin for a layer with a rotary module inside: its recomputation sees the coordinates of its forward.

    Relies on: `GradientCheckpointingLayer.__call__` reads `_gradient_checkpointing_func` from the layer, and
    `activation_checkpointing_enable` sets it there.
    """

    @property
    def _gradient_checkpointing_func(self) -> Any:
        return partial(checkpoint_with_context, self.__dict__["_gradient_checkpointing_func"])

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Any) -> None:
        self.__dict__["_gradient_checkpointing_func"] = function


# Attention


class _MaskStandIn(BlockMask):
    """What is passed in place of a mask.

    Relies on: `transformers.masking_utils` returns a BlockMask with a four-dimensional shape as it is, so a
    model passes it on to the attention function of every layer. Nothing of BlockMask but its type and `shape`
    is used.
    """

    def __init__(self, queries: int) -> None:
        self._queries = queries

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, 1, self._queries, self._queries


class AttentionBackend(_MaskStandIn, ABC):
    """Attention implementation that is passed in place of a mask."""

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`[rows, tokens, heads, dim]` of queries, keys and values `[rows, heads, tokens, dim]`.

        A step of the engine is one row; its backend takes keys and values from the cache. Several heads of
        queries may share one of keys and values.

        softcap: scores become `softcap * tanh(score / softcap)` before masks and penalties.
        sinks: `[heads]` scores of a further key whose value is zero.
        """


class LayerMask(_MaskStandIn, ABC):
    """Mask that is another one in each layer."""

    @abstractmethod
    def of_layer(self, attention: nn.Module) -> Tensor | AttentionBackend:
        """The mask of an attention module."""


def replace_layer_mask(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook before the forward of an attention module of a model set to eager, which takes plain masks alone.

    Relies on: layers pass the mask by its name, `attention_mask`.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, LayerMask):
        kwargs = {**kwargs, "attention_mask": mask.of_layer(attention)}
    return args, kwargs


class OwnAttention:
    """Makes a model's text layers call attention that accepts an AttentionBackend or a BlockMask.

    The functions are registered under names of their own. While at least one caller has acquired it, the
    configurations of the model's text modules have these names in place of sdpa and flex_attention.
    The functions of the original name compute everything else, masks included.

    Relies on: modules read `config._attn_implementation` in each forward pass;
    `_attn_implementation_internal` sets it for one configuration alone and is not saved to config.json; the
    names contain the originals, so that `PreTrainedModel.get_correct_attn_implementation` makes the same
    checks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        configs = (getattr(module, "config", None) for module in text_modules(model).values())
        self._configs = list(
            {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values()
        )

    def acquire(self) -> None:
        """Switch the configurations to the project's names. Thread-safe; calls are counted."""
        with _lock:
            _register_attention()
            setattr(self._model, _USERS, getattr(self._model, _USERS, 0) + 1)
            self._rename(_OWN_NAMES)

    def release(self) -> None:
        """Restore the original names once every caller has released."""
        with _lock:
            users = getattr(self._model, _USERS) - 1
            if users:
                setattr(self._model, _USERS, users)
                return
            delattr(self._model, _USERS)
            self._rename(_ORIGINAL_NAMES)

    def _rename(self, names: dict[str, str]) -> None:
        for config in self._configs:
            if name := names.get(str(config._attn_implementation)):
                config._attn_implementation_internal = name

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def attention_name(model: PreTrainedModel | PeftModel) -> str:
    """The attention implementation that a model is set to, by transformers' own name."""
    name = str(model.config._attn_implementation)
    return _ORIGINAL_NAMES.get(name, name)


def has_own_attention(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model is switched to `OwnAttention` now."""
    return str(model.config._attn_implementation) in _ORIGINAL_NAMES


def hands_over_masks(model: PreTrainedModel) -> bool:
    """Whether `passes_masks`, and the attention function is one that `OwnAttention` replaces."""
    return attention_name(model) in _OWN_NAMES and passes_masks(model)


def passes_masks(model: PreTrainedModel) -> bool:
    """Whether every layer passes mask, queries and keys unchanged to the configured attention function.

    Relies on: `_supports_flex_attn`, which is False for models that compute with the mask themselves; the
    name `ALL_ATTENTION_FUNCTIONS` in the module that defines a layer, which is another table where a model
    overrides attention functions.
    """
    modules, layers = text_modules(model).values(), decoder_layers(model)
    return (
        all(module._supports_flex_attn for module in modules if isinstance(module, PreTrainedModel))
        and len(layers) > 0
        and all(_attention_table(layer) is ALL_ATTENTION_FUNCTIONS for layer in layers)
    )


def compares_attention_name(model: PreTrainedModel) -> bool:
    """Whether the model's source compares the name of its attention, so that another name changes it.

    Relies on: `_attn_implementation` is compared in the module that defines the model's classes. True where
    there is no source.
    """
    sources = {type(module).__module__ for module in text_modules(model).values()}
    return any(_compares_attention_name(source) for source in sources if not source.startswith("torch."))


@cache
def _compares_attention_name(module_name: str) -> bool:
    try:
        source = inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return True
    return re.search(r"\._attn_implementation\s*(==|!=|in\b|not in\b)", source) is not None


def _attention_table(layer: nn.Module) -> Any:
    sources = (sys.modules[own_class.__module__] for own_class in type(layer).__mro__)
    tables = (getattr(source, "ALL_ATTENTION_FUNCTIONS", None) for source in sources)
    return next((table for table in tables if table is not None), None)


def _register_attention() -> None:
    AttentionInterface.register(_OWN_NAMES[SDPA], _sdpa_attention)
    AttentionInterface.register(_OWN_NAMES[FLEX], _flex_attention)
    AttentionMaskInterface.register(_OWN_NAMES[SDPA], sdpa_mask)
    AttentionMaskInterface.register(_OWN_NAMES[FLEX], flex_attention_mask)


def _sdpa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """`[batch, tokens, heads, dim]` of `[batch, heads, tokens, dim]`, and the weights or None."""
    if step_ops.is_attending():
        return _attend_in_step(module, query, key, value, attention_mask, **kwargs), None
    if isinstance(attention_mask, LayerMask):
        attention_mask = attention_mask.of_layer(module)
    if isinstance(attention_mask, BlockMask):
        return _attend_over_blocks(module, query, key, value, attention_mask, **kwargs)
    # transformers itself refuses a softcap
    _refuse_unknown(kwargs, "scaling", "dropout", "position_bias", "softcap")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _flex_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if step_ops.is_attending():
        return _attend_in_step(module, query, key, value, attention_mask, **kwargs), None
    if isinstance(attention_mask, BlockMask):
        return _attend_over_blocks(module, query, key, value, attention_mask, **kwargs)
    _refuse_unknown(kwargs, *_FLEX_HONOURS, "position_bias")
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _attend_in_step(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> Tensor:
    """Attention in a step of the engine. Relies on: attention modules know their `layer_idx`."""
    _refuse_unknown({**kwargs, "dropout": kwargs.get("dropout") or None}, "scaling", "softcap", "s_aux")
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    layer: Any = module.layer_idx
    attended: Tensor = step_ops.attend(query, key, value, mask, layer, scale, softcap, sinks)
    return attended


def _attend_over_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention by an AttentionBackend, or FlexAttention with the mask's `SCORE_BIAS`.

    Relies on: `flex_attention_forward` indexes `position_bias` with (batch, head, query, key) and does
    nothing else to it.
    """
    if isinstance(mask, AttentionBackend):
        _refuse_unknown({**kwargs, "dropout": kwargs.get("dropout") or None}, "scaling", "softcap", "s_aux")
        scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        return mask.attend(query, key, value, scale, kwargs.get("softcap"), kwargs.get("s_aux")), None
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast converts the inputs of SDPA only
    if bias := getattr(mask, SCORE_BIAS, None):
        _refuse_unknown(kwargs, *_FLEX_HONOURS)
        kwargs["position_bias"] = bias
    else:
        _refuse_unknown(kwargs, *_FLEX_HONOURS, "position_bias")
    if torch.compiler.is_compiling():
        return flex_attention_forward(module, query, key, value, mask, **kwargs)
    # New shapes, single rows and passes without gradients are compiled separately. Past torch's limit of 8 a
    # call would run uncompiled, which materialises the score of every pair.
    with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
        return flex_attention_forward(module, query, key, value, mask, **kwargs)


def _refuse_unknown(kwargs: dict[str, Any], *honoured: str) -> None:
    """Raise ValueError if a layer passes a value that the attention would ignore.

    Relies on: the keys of `TransformersKwargs`, which a model hands to every layer and no attention but
    FlashAttention reads. Windows are part of the mask.
    """
    known = {*honoured, *_WITHOUT_EFFECT}
    for name, value in kwargs.items():
        if name not in known and value is not None:
            raise ValueError(
                f"attn_implementation: the model's layers pass {name}, which this attention does not honour; "
                "set the model to eager"
            )


# Structure of models


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers of the text model. Relies on: they are the modules that can recompute their activations."""
    modules = text_modules(model).values()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


def applies_sliding_window(decoder: nn.Module) -> bool:
    """Whether a decoder without `layer_types` applies the `sliding_window` of its configuration.

    Relies on: a module that applies windows imports `create_sliding_window_causal_mask`. Some configurations
    have the field and their model never reads it.
    """
    return hasattr(sys.modules[type(decoder).__module__], "create_sliding_window_causal_mask")


def is_stateful(model: PreTrainedModel) -> bool:
    """Whether layers keep a recurrent state. Relies on: `PreTrainedModel._is_stateful`."""
    return model._is_stateful


def block_class_names(model: PreTrainedModel) -> set[str]:
    """Class names of layers that must stay on one device. Relies on: `PreTrainedModel._no_split_modules`."""
    return set(getattr(model, "_no_split_modules", None) or ())


class DecodedModel:
    """Stand-in for a model whose decoder has already run: its class's `forward` then computes the head alone.

    Relies on: the class's `forward` calls its decoder once and reads `last_hidden_state` or index 0 of the
    result.
    """

    def __init__(self, model: PreTrainedModel, hidden: Tensor) -> None:
        self._model, self._decoder, self._output = model, decoder_name(model), _DecoderOutput(hidden)

    def __getattr__(self, name: str) -> Any:
        return (lambda *_, **__: self._output) if name == self._decoder else getattr(self._model, name)


class _DecoderOutput:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


# Loading and wrapping


def drop_quantization(model: PreTrainedModel) -> None:
    """Let a model that was loaded from GGUF be saved as plain weights.

    Relies on: `save_pretrained` refuses models with `config.quantization_config` or `hf_quantizer`.
    """
    del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]


def wrap_with_adapter(model: PreTrainedModel | PeftModel, settings: peft.LoraConfig, name: str) -> PeftModel:
    """Add an untrained adapter with this name, without warnings that do not apply here.

    Relies on: the texts of three warnings. peft reads an attribute that transformers has renamed, reports how
    GPT-2 stores its weights, and sets rank patterns for fused experts that the targets do not cover.
    """
    with warnings.catch_warnings(), implicit_replication():  # DoRA computes with sharded weights of the base
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        warnings.filterwarnings(
            "ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning
        )
        if isinstance(model, PeftModel):
            model.add_adapter(name, settings)
            return model
        return cast(PeftModel, get_peft_model(model, settings, adapter_name=name))


@contextmanager
def sharded_loading(mesh: DeviceMesh, whole_embeddings: bool) -> Iterator[None]:
    """Within it, `from_pretrained` shards every parameter over the mesh and reads this process's part alone.

    whole_embeddings: leave the embeddings whole. Raises ValueError for weights that are not safetensors.

    Relies on: `PreTrainedModel._load_pretrained_model` gets a model on the meta device, and reads slices of a
    parameter that is a DTensor.
    """
    original = PreTrainedModel._load_pretrained_model

    def load(model: PreTrainedModel, state_dict: Any, files: list[str], *args: Any) -> Any:
        if not all(file.endswith(".safetensors") for file in files):
            raise ValueError("sharding=full reads parts of safetensors files, and these are pickles")
        whole = [model.get_input_embeddings(), model.get_output_embeddings()] if whole_embeddings else []
        shard_parameters(model, mesh, {module.weight for module in whole if module is not None})
        # Read, not mapped: pages of a mapped file count as memory of the process.
        opened = [safe_open(file, framework="pt", backend="pread") for file in files]
        slices = {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118
        return original(model, slices, None, *args)

    PreTrainedModel._load_pretrained_model = staticmethod(load)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(original)  # type: ignore[method-assign]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers within the context. Relies on: `transformers.utils.logging`."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def delayed_progress_bars() -> Iterator[None]:
    """Show the progress bars of transformers within the context as `DelayedBar`.

    Relies on: `transformers.utils.logging.set_tqdm_hook`.
    """
    previous = transformers_logging.set_tqdm_hook(lambda _, args, options: DelayedBar(*args, **options))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


@contextmanager
def no_load_report() -> Iterator[None]:
    """Hide the table of missing and unused weights within the context, unless a conversion failed.

    Relies on: `transformers.modeling_utils` logs it as one record with the words "LOAD REPORT".
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def is_shown(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "LOAD REPORT" not in message or "CONVERSION" in message

    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


# Sampling


def process_rows(
    processor: type[LogitsProcessor],
    attribute: str,
    values: Tensor,
    scores: Tensor,
    input_ids: Tensor | None = None,
) -> Tensor:
    """Apply a logits processor that takes a single number, with a different number for each row.

    values: `[rows]` numbers. scores: `[rows, vocab]`. input_ids: `[rows, tokens]` history of each row.

    Relies on: the constructor takes the number alone and stores it under `attribute`; the call uses it in
    arithmetic and comparisons only, which a `[rows, 1]` column broadcasts.
    """
    instance: Any = processor(1.0)  # type: ignore[call-arg]
    setattr(instance, attribute, values[:, None])
    processed: Tensor = instance(input_ids, scores)
    return processed
