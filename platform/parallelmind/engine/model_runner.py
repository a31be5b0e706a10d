"""The tensors of decoding: one forward pass of the model over a step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.engine.attention import CascadeAttention, additive, dense
from parallelmind.engine.batch import ModelInput, SequenceBlocks
from parallelmind.engine.block_manager import BLOCK, BlockTable
from parallelmind.engine.kv_cache import PagedKVCache
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.sequence import ScheduledTokens, SequenceState
from parallelmind.engine.sequence_group import Running
from parallelmind.layout import Tokens
from parallelmind.model.cpu_linears import cpu_linears, small_batch_linear
from parallelmind.model.hf_compat import OwnAttention, hands_over_masks
from parallelmind.model.mask import layer_windows
from parallelmind.model.patch import is_patched
from parallelmind.model.rotary import depends_on_length
from parallelmind.model.structure import causal_lm

Model = PreTrainedModel | PeftModel
Part = tuple[Running, ScheduledTokens]

_CONTAINER = Path("/sys/fs/cgroup")
_MOST_TOKENS = 1 << 20  # of a pool whose size nobody has named


class ModelRunner:
    """Samples side by side in one sequence, over one pool of keys and values."""

    def __init__(self, model: Model) -> None:
        self.use(model)
        inner = causal_lm(model)
        self.alone = depends_on_length(inner)  # the longest text of a call sets everybody's frequencies
        self.cache = PagedKVCache()
        self._patched = is_patched(inner)
        self._reaches = layer_windows(model)
        self._attention = OwnAttention(inner) if hands_over_masks(inner) else None

    def use(self, model: Model) -> None:
        """The same model, once an adapter has been put on it or taken off."""
        self.model, self._layers = model, cpu_linears(model)

    def enter(self, parts: Sequence[Part]) -> ModelInput:
        """Give the tokens of these feeds their places. Nothing of the samples is looked at any more
        afterwards.
        """
        self.cache.reserve(max(entry.stored().extent for entry, _ in parts))
        return ModelInput.of([(entry.decoding, feed, entry.stored()) for entry, feed in parts])

    @torch.inference_mode()
    def __call__(self, step: ModelInput) -> Tensor:
        """`[sampled, vocab]` logits after the tokens that ask for them, sample by sample; all others enter
        the pool alone.
        """
        device = self.model.device
        columns = torch.from_numpy(
            np.stack([step.ids, step.branch, step.time, step.position, step.slots])
        ).to(device)
        ids, branch, time, position, slots = columns
        inputs: dict[str, Any] = {
            "input_ids": ids[None],
            "attention_mask": self._address(step, slots),
            "position_ids": position[None],
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": torch.from_numpy(step.rows).to(device),
        }
        if self._patched:
            inputs["pos2d"] = torch.stack([branch, time], dim=-1)[None]
        with small_batch_linear(self._layers), self._attention or nullcontext():
            logits: Tensor = self.model(**inputs).logits
        return logits[0]

    def _address(self, step: ModelInput, slots: Tensor) -> Any:
        """Tell the cache where this call writes and reads; returns the masks as the model takes them."""
        tokens, dtype, device = len(step.ids), self.model.dtype, self.model.device
        masks: dict[Any, Any]
        if self._attention is not None:
            self.cache.address(slots, None)
            masks = {
                reach: CascadeAttention(step.stretches, tokens, reach, dtype, device)
                for reach in set(self._reaches.values())
            }
        else:
            read, added = dense(step.stretches, tokens, list(set(self._reaches.values())))
            self.cache.address(slots, torch.from_numpy(read).to(device))
            masks = {reach: additive(bias[None, None], dtype, device) for reach, bias in added.items()}
        if len(masks) == 1:
            return masks.popitem()[1]
        return {kind: masks[reach] for kind, reach in self._reaches.items()}

    def forget(self, entry: Running, branch: int) -> None:
        """A branch has ended; its blocks are the scheduler's concern."""

    def limited(self, limits: EngineConfig | None, config: RopeConfig, engines: int) -> EngineConfig:
        """What the pool may grow to: as it is given, or by the memory that so many engines share."""
        limits = limits or EngineConfig(cache_tokens=self._tokens_that_fit(config, engines))
        self.cache.most = limits.cache_tokens
        return limits

    def _tokens_that_fit(self, config: RopeConfig, engines: int) -> int:
        """How many tokens each engine's part of half of the free memory can hold, by what one of them
        takes.
        """
        decoding = SequenceState(Tokens.of([], [[0]]), config)
        entry = Running(
            0,
            "",
            decoding,
            [1],
            storage=SequenceBlocks(BlockTable([0]), [BlockTable([1])] if decoding.free else None),
        )
        self(self.enter([(entry, decoding.feed(1))]))
        size = self.cache.bytes_per_token()
        self.cache.reset()
        free = torch.cuda.mem_get_info()[0] if self.model.device.type == "cuda" else _free_memory(_CONTAINER)
        return min(max(free // 2 // engines // size, BLOCK), _MOST_TOKENS)


def _free_memory(container: Path) -> int:
    """Bytes that this machine has left, or the container's limit; files that the kernel keeps in memory make
    room.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        most, used = (int((container / f"memory.{name}").read_text()) for name in ("max", "current"))
        kept = dict(line.split() for line in (container / "memory.stat").read_text().splitlines())
        return min(free, most - used + int(kept["inactive_file"]) + int(kept["active_file"]))
    except (OSError, ValueError, KeyError):  # no container, or one without a limit
        return free
