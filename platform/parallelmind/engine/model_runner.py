"""Run the model over the scheduled tokens of all samples, side by side in one sequence."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from parallelmind.engine import device_lora, native_linear
from parallelmind.engine.attention import additive_mask, dense_masks
from parallelmind.engine.batch import ModelInput, single_token
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.block_table import BlockTables
from parallelmind.engine.compiled_forward import compile_forward, compiling
from parallelmind.engine.device_lora import DeviceLora, recorded_readers
from parallelmind.engine.device_steps import DeviceSteps
from parallelmind.engine.flex_attention import FlexAttention, is_chosen
from parallelmind.engine.greedy_head import GreedyHead, is_last, recorded_outputs
from parallelmind.engine.kv_cache import PagedKVCache
from parallelmind.engine.native import kernels
from parallelmind.engine.native_attention import NativeLayer
from parallelmind.engine.native_lora import LoraRows, is_possible
from parallelmind.engine.native_operators import NativeOperators, declarations
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.sequence import BranchState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.sibling_penalties import SiblingPenalties
from parallelmind.engine.step import IndirectCacheError, Step
from parallelmind.engine.step_buffers import StepBuffers
from parallelmind.engine.step_plan import ForwardPlan
from parallelmind.errors import UserNotice, first_line
from parallelmind.layout import is_free_order
from parallelmind.model import step_ops
from parallelmind.model.attention import fits_heads
from parallelmind.model.forward_context import text_length
from parallelmind.model.hf_compat import OwnAttention, attention_name, hands_over_masks
from parallelmind.model.mask import layer_windows
from parallelmind.model.packed_linear import PackedLinears, recorded_groups
from parallelmind.model.patch_state import is_patched, rope_config
from parallelmind.model.penalty_attention import DensePenaltyMask
from parallelmind.model.rotary import depends_on_length, frequency_limit
from parallelmind.model.structure import causal_lm, eval_mode
from parallelmind.visibility import AttentionWindow

Model = PreTrainedModel | PeftModel

_CGROUP = Path("/sys/fs/cgroup")
_MIN_COMPILED_PARAMETERS = 50_000_000  # compiling takes half a minute, and gains little below
_MAX_CACHE_TOKENS = 1 << 20  # of a cache without a configured size


class ModelRunner:
    """One forward pass over samples side by side, on one paged KV cache.

    one_sample_per_forward: whether samples must not share a forward pass.
    frequency_limit: positions above which the model has other rotary frequencies; None: it never has.
    has_long_frequencies: whether samples above that limit can be computed.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        inner = causal_lm(model)
        # On such a model the longest sample of a forward pass sets the rotary frequencies of all its samples.
        self.one_sample_per_forward = depends_on_length(inner)
        self._patched = is_patched(inner)
        self.frequency_limit = frequency_limit(inner)
        self.has_long_frequencies = self._patched and not is_chosen(inner.device)
        self.cache = PagedKVCache()
        self._has_scores = self._patched and not is_free_order(rope_config(inner))
        self._layer_windows = layer_windows(model)
        self._windows = list(dict.fromkeys(self._layer_windows.values()))
        self._attention_name = ""
        self._is_direct = True  # whether layers attend to exactly what they give the cache
        self._linears: PackedLinears | None = None  # until the first forward pass
        self._compiled: Callable[..., Any] | None = None
        self._operators: NativeOperators | None = None  # of compiled code
        self._kernels: dict[int, NativeLayer] = {}
        self._head: GreedyHead | None = None  # if it is the model's last operation
        self._lora: LoraRows | None = None  # adapters by row, where that is possible
        self._device_steps: DeviceSteps | None = None  # of an accelerator
        self._device_lora: DeviceLora | None = None  # the same as `_lora`, there
        self._readers: set[nn.Module] = set()  # layers that read one row for each token
        self._penalties = SiblingPenalties(inner)

    def set_model(self, model: Model) -> None:
        """Set the model again after an adapter was added or removed."""
        self.model = model
        if self._device_steps is not None:
            self._device_steps.forget_graphs()
        self._penalties = SiblingPenalties(causal_lm(model))
        self._find_adapters()

    def _choose_attention(self) -> None:
        """Follow the model's attention implementation, which may be set anew between steps."""
        name = attention_name(self.model)
        if name != self._attention_name:
            inner = causal_lm(self.model)
            self._attention_name = name
            self._attends_in_step = self._is_direct and hands_over_masks(inner)
            self._attention = OwnAttention(inner) if self._attends_in_step else nullcontext()
            self._device_steps = None

    def prepare_inputs(self, forward: ForwardPlan, tables: BlockTables) -> ModelInput:
        """Lay the staged tokens side by side. The forward pass does not access the samples."""
        inputs = ModelInput.of(forward, tables)
        self.cache.reserve(BLOCK * (1 + int(inputs.slots.max()) // BLOCK))
        return inputs

    @torch.inference_mode()
    def __call__(self, inputs: ModelInput, ids: Tensor | None = None, greedy: bool = False) -> Tensor:
        """`[sampled, vocab]` logits of the tokens in `logits_indices`; caches all tokens.

        ids: as in `DeviceSteps`, where `computes_ahead`.
        greedy: whether `[sampled]` most likely tokens are enough, which are returned where the head finds
            them; -1 for a row without a finite largest logit.
        """
        if self._linears is None and not is_chosen(self.model.device):
            return self._record_linears(inputs, self.cache)
        if (steps := self._steps_on_device(inputs.tables)) is not None:
            return steps(self._device_lora.numbered(inputs) if self._device_lora else inputs, ids)
        assert self._linears is not None, "they are recorded"
        lora, num_sampled = self._lora, len(inputs.logits_indices)
        head = self._head if greedy and self._adapts_by_row else None
        if self._compiled is not None and self._adapts_by_row and text_length() is None:
            padded = inputs.padded()
            return self._forward(self._compiled, padded, self.cache, self._linears, lora, head)[:num_sampled]
        with self._linears.active(), nullcontext() if lora is None else lora.active():
            return self._forward(self.model, inputs, self.cache, self._linears, lora, head)

    def _steps_on_device(self, tables: BlockTables) -> DeviceSteps | None:
        """Runs the steps on an accelerator; None on a CPU, and for a model that FlexAttention rejects.

        None also for learned penalties, which `CascadeAttention` computes.
        """
        inner = causal_lm(self.model)
        if not is_chosen(inner.device):
            return None
        if self._linears is None:
            self._record_linears(single_token(), _probe_cache())
        self._choose_attention()
        fits = self._attends_in_step and fits_heads(inner) and not self._penalties
        if self._device_steps is None and fits:
            num_blocks = len(tables.time) // BLOCK
            self.cache.reserve(BLOCK * (num_blocks + 1))  # the addresses of the pools are captured
            self._device_steps = DeviceSteps(self._forward_in_buffers, tables, num_blocks, inner.device)
        return self._device_steps

    def _forward_in_buffers(
        self, inputs: ModelInput, buffers: StepBuffers, attention: FlexAttention
    ) -> Tensor:
        assert self._linears is not None, "they are recorded"
        lora, cache = self._device_lora, self.cache
        cache.set_step(buffers.columns[-1], None)
        step = Step(inputs, cache, self._windows, self._linears.groups, self._kernels, flex=attention)
        if lora is not None:
            lora.begin(buffers.adapter, buffers.sampled)
        with self._linears.active(), nullcontext() if lora is None else lora.active():
            return self._call(self.model, step, buffers.columns, self._step_masks(), buffers.sampled)

    @property
    def computes_ahead(self) -> bool:
        """Whether a step can begin while the host waits for the tokens that it starts from."""
        return self._device_steps is not None

    @property
    def batches_adapters(self) -> bool:
        """Whether samples with different adapters can share a forward pass.

        With dense masks, layers with learned penalties read those of the active adapter.
        """
        on_device = self._device_lora is not None and self._device_steps is not None
        by_row = self._lora is not None or on_device
        return by_row and (self._attends_in_step or not self._penalties)

    def _record_linears(self, inputs: ModelInput, cache: PagedKVCache) -> Tensor:
        """A forward pass that finds out how the model computes."""
        cache.updates = []
        try:
            inner = causal_lm(self.model)
            head: Any = inner.get_output_embeddings()
            with (
                recorded_groups(inner, native_linear.pack) as groups,
                recorded_readers(inner) as readers,
                recorded_outputs(head) as outputs,
            ):
                logits = self._forward(self.model, inputs, cache)
        except IndirectCacheError:
            self._is_direct, self._attention_name = False, ""
            return self._record_linears(inputs, cache)
        finally:
            cache.updates = None
        self._linears, self._readers = PackedLinears(groups), readers
        greedy = GreedyHead.find(head, groups)
        self._head = greedy if greedy and is_last(outputs, logits) else None
        self._find_adapters()
        return logits

    def _find_adapters(self) -> None:
        self._lora = self._device_lora = None
        if not isinstance(self.model, PeftModel):
            return
        if is_chosen(self.model.device):
            by_row = device_lora.is_possible(self.model, self._readers)
            self._device_lora = DeviceLora(self.model) if by_row else None
            return
        groups = self._linears.groups if self._linears else ()
        by_row = bool(groups) and is_possible(self.model, groups)
        head = causal_lm(self.model).get_output_embeddings()
        self._lora = LoraRows(self.model, groups, head) if by_row else None

    @torch.inference_mode()
    def warm_up(self, always: bool, tables: BlockTables) -> bool:
        """Compile the forward pass, if that is possible; returns whether it is compiled.

        always: also for a small model, whose steps take little time. A UserNotice tells why a pass that could
        be compiled is not. On an accelerator the kernels of attention are compiled. tables: of the cache.
        """
        if (steps := self._steps_on_device(tables)) is not None:
            steps.warm_up(self._has_scores)
            return True
        if self._linears is None:
            self._record_linears(single_token(), _probe_cache())
        inner = causal_lm(self.model)
        is_large = sum(weight.numel() for weight in inner.parameters()) >= _MIN_COMPILED_PARAMETERS
        if self.can_compile and self._adapts_by_row and (is_large or always):
            try:
                self._compile(inner)
            except Exception as error:  # of the compiler, whose code this is not
                self._compiled = None
                reason = f"{type(error).__name__}: {first_line(error)}"
                warnings.warn(f"decoding runs uncompiled ({reason})", UserNotice, stacklevel=3)
        return self._compiled is not None

    @property
    def _adapts_by_row(self) -> bool:
        """Whether one forward pass computes samples with any adapter, or the model has none."""
        return self._lora is not None or not isinstance(self.model, PeftModel)

    @property
    def can_compile(self) -> bool:
        """Whether the forward pass can be compiled. Known after the first pass, which `warm_up` runs, too."""
        return self._attends_in_step and self.model.device.type == "cpu" and kernels() is not None

    def _compile(self, inner: PreTrainedModel) -> None:
        assert self._linears is not None, "a pass has recorded them"
        cache = _probe_cache()
        lora_mode = nullcontext() if self._lora is None else self._lora.active()
        with eval_mode(self.model), self._linears.active(), lora_mode, compiling():
            self._forward(inner, single_token(), cache, self._linears, self._lora)  # makes the cache's pools
            self._operators = NativeOperators(self._linears, dict(cache.layer_pools))
            self._compiled = compile_forward(inner, declarations(inner.dtype))
            inputs = single_token().padded(tokens=6, sampled=3)
            self._forward(self._compiled, inputs, cache, self._linears, self._lora)

    def _forward(
        self,
        call: Any,
        inputs: ModelInput,
        cache: PagedKVCache,
        linears: PackedLinears | None = None,
        lora: LoraRows | None = None,
        head: GreedyHead | None = None,
    ) -> Tensor:
        """`[sampled, vocab]` logits; `[sampled]` tokens with a head that finds them."""
        self._choose_attention()
        device = self.model.device
        columns = np.stack([inputs.ids, inputs.branch, inputs.time, inputs.position, inputs.slots])
        tokens = torch.from_numpy(columns).to(device)  # one copy to the device
        masks = self._masks(inputs, tokens[-1], cache)
        if head is not None and lora is not None and lora.adapts(head.group):
            head = None
        groups, penalties = linears.groups if linears else (), self._penalties.of(inputs.adapters)
        step = Step(inputs, cache, self._windows, groups, self._kernels, lora, penalties=penalties, head=head)
        logits = self._call(call, step, tokens, masks, torch.from_numpy(inputs.logits_indices).to(device))
        return logits if head is None else step.largest

    def _call(self, call: Any, step: Step, columns: Tensor, masks: Any, sampled: Tensor) -> Tensor:
        """`[sampled, vocab]` logits. columns: `[5, tokens]`, as in `StepBuffers`."""
        ids, branch, time, position, _ = columns
        kwargs: dict[str, Any] = {
            "input_ids": ids[None],
            "attention_mask": masks,
            "position_ids": position[None],
            "past_key_values": step.cache,
            "use_cache": True,
            "logits_to_keep": sampled,
        }
        if self._patched:
            kwargs["pos2d"] = torch.stack([branch, time], dim=-1)[None]
        # Compiled code is that of a model in eval mode.
        mode: AbstractContextManager[Any] = eval_mode(self.model)
        if self._operators is not None and call is self._compiled:
            mode = self._operators.running(step, step.cache)
        with mode, self._attention, step_ops.running(step):
            logits: Tensor = call(**kwargs).logits
        return logits[0]

    def _masks(self, inputs: ModelInput, slots: Tensor, cache: PagedKVCache) -> Any:
        """Set the cache to the slots of this step; returns the masks in the form that the model takes."""
        if self._attends_in_step:
            cache.set_step(slots, None)
            return self._step_masks()
        kv_indices, biases = dense_masks(inputs.segments, len(inputs.ids), self._windows)
        cache.set_step(slots, torch.from_numpy(kv_indices).to(self.model.device))
        return self._by_layer_type({window: self._dense_mask(bias) for window, bias in biases.items()})

    def _dense_mask(self, bias: NDArray[np.float32]) -> Tensor | DensePenaltyMask:
        """The mask of a step from the `[tokens, keys]` summand of its scores."""
        dtype, device = self.model.dtype, self.model.device
        if not self._penalties:
            return additive_mask(bias[None, None], dtype, device)
        scores = torch.from_numpy(bias)[None, None].to(device, dtype)
        is_sibling = scores == -1  # as `effective_penalty` marks them
        siblings = torch.full_like(scores, -torch.inf).masked_fill_(is_sibling, 0)
        return DensePenaltyMask(scores.masked_fill(is_sibling, -torch.inf), siblings)

    def _step_masks(self) -> Any:
        """The numbers of the windows, for attention that is computed by the step."""
        return self._by_layer_type({window: step_ops.step_mask(i) for i, window in enumerate(self._windows)})

    def _by_layer_type(self, masks: Mapping[AttentionWindow, Any]) -> Any:
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {layer_type: masks[window] for layer_type, window in self._layer_windows.items()}

    def free(self, group: SequenceGroup, branch: BranchState) -> None:
        """Do nothing for a finished branch: the scheduler frees its blocks."""

    def forget(self, group: SequenceGroup) -> None:
        """Do nothing for a preempted sample, either."""

    def resolve_config(self, config: EngineConfig | None, num_engines: int) -> EngineConfig:
        """`config` if it is given, else a cache of half of the free memory, divided by `num_engines`."""
        config = config or EngineConfig(cache_tokens=self._cache_tokens_that_fit(num_engines))
        self.cache.max_slots = config.cache_tokens
        return config

    def _cache_tokens_that_fit(self, num_engines: int) -> int:
        cache = _probe_cache()
        self._forward(self.model, single_token(), cache)
        on_gpu = self.model.device.type == "cuda"
        free = torch.cuda.mem_get_info()[0] if on_gpu else _free_memory(_CGROUP)
        return min(max(free // 2 // num_engines // cache.bytes_per_token(), BLOCK), _MAX_CACHE_TOKENS)


def _probe_cache() -> PagedKVCache:
    """A cache for the token of `single_token`."""
    cache = PagedKVCache()
    cache.reserve(BLOCK)
    return cache


def _free_memory(cgroup: Path) -> int:
    """Free bytes of the machine, or of the container if that is less; the file cache counts as free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    except (OSError, ValueError, KeyError):  # no container, or one without a limit
        return free
