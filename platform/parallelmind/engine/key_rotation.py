"""Move cached keys in time: rotate them by a number of time steps.

With `positions=time`, the keys of isolated texts at two start times differ by one rotation alone. Each model
has its own order of the dimensions of a head, so the order is found by a forward pass of one token at two
times, and a model whose keys are not found to rotate is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.engine.kv_cache import Change, PagedKVCache
from parallelmind.model.mask import layer_windows
from parallelmind.model.rotary import depends_on_length, time_frequencies
from parallelmind.model.structure import causal_lm, eval_mode
from parallelmind.tree import Ints

_PROBE_STEPS = 7  # time steps between the two times
# The mean error as a share of the states. Rounding to bfloat16 causes less, another order of dimensions more.
_TOLERANCE = 0.03


@dataclass(frozen=True)
class PairRotation:
    """How a time step turns states of one kind.

    first, second: the dimensions that turn together, pair by pair. angles: `[pairs]` float64, for one step.
    """

    first: slice
    second: slice
    angles: Tensor

    def rotate_(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn `[tokens, …, dim]` states in place. cos, sin: `[tokens, pairs]` of the angles."""
        if len(self.angles):
            cos, sin = (table.view(len(states), *(1,) * (states.dim() - 2), -1) for table in (cos, sin))
            one, other = states[..., self.first].float(), states[..., self.second].float()
            first, second = (one * cos).addcmul_(other, sin, value=-1), (other * cos).addcmul_(one, sin)
            states[..., self.first], states[..., self.second] = first, second
        return states


@dataclass(frozen=True)
class KeyRotation:
    """How time steps turn what the cache holds of a token, by layer and kind of state."""

    by_name: Mapping[str, PairRotation]

    @staticmethod
    def find(model: PreTrainedModel | PeftModel) -> KeyRotation | None:
        """The rotation of a model's states; None if they do not turn by the number of steps alone."""
        inner = causal_lm(model)
        if depends_on_length(inner) or _depends_on_time(inner):
            return None
        angles, found = list(time_frequencies(inner)), dict[str, PairRotation]()
        for name, (now, later) in _states_at_two_times(inner).items():
            rotation = _matching(_candidates(angles, now.shape[-1]), now, later)
            if rotation is None:
                return None
            found[name] = rotation
        return KeyRotation(found)

    def by(self, steps: Ints) -> Change:
        """What turns `[tokens, …]` states by numbers of steps, in place. steps: `[tokens]`."""
        tables: dict[int, tuple[Tensor, Tensor]] = {}  # layers of one kind have one tensor of angles

        def change(name: str, states: Tensor) -> Tensor:
            rotation = self.by_name[name]
            if id(rotation.angles) not in tables:
                tables[id(rotation.angles)] = _tables(rotation.angles, steps, states.device)
            return rotation.rotate_(states, *tables[id(rotation.angles)])

        return change


def _tables(angles: Tensor, steps: Ints, device: torch.device) -> tuple[Tensor, Tensor]:
    """`[tokens, pairs]` float32 cosines and sines."""
    turned = torch.from_numpy(steps)[:, None] * angles
    return turned.cos().float().to(device), turned.sin().float().to(device)


def _depends_on_time(model: PreTrainedModel) -> bool:
    """Whether chunks of attention begin at certain times, or scores grow with time."""
    config: Any = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    grows = getattr(config, "attn_temperature_tuning", None) or parameters.get("llama_4_scaling_beta")
    return bool(grows) or any(window.chunk for window in layer_windows(model).values())


@torch.inference_mode()
def _states_at_two_times(model: PreTrainedModel) -> dict[str, Tensor]:
    """`[2, …, dim]` states of one token at time 0 and at time `_PROBE_STEPS`, by layer and kind."""
    cache, device = PagedKVCache(), model.device
    cache.reserve(2)
    for slot in range(2):
        cache.set_step(*torch.full((2, 1), slot, device=device))
        time = torch.tensor([[slot * _PROBE_STEPS]], device=device)
        with eval_mode(model):
            model(torch.ones_like(time), position_ids=time, past_key_values=cache, use_cache=True)
    return cache.read_slots(np.arange(2))


def _candidates(angles: Sequence[Tensor], dim: int) -> Iterator[PairRotation]:
    """What models do: turn nothing; or halves or neighbours, at the start or the end, in either direction."""
    yield PairRotation(slice(0), slice(0), torch.zeros(0).double())
    for own in (turned for forwards in angles for turned in (forwards, -forwards)):
        num_turned = 2 * len(own)
        for start in {0, dim - num_turned} if num_turned <= dim else ():
            middle, end = start + len(own), start + num_turned
            yield PairRotation(slice(start, middle), slice(middle, end), own)
            yield PairRotation(slice(start, end, 2), slice(start + 1, end, 2), own)


def _matching(candidates: Iterable[PairRotation], now: Tensor, later: Tensor) -> PairRotation | None:
    """The candidate that turns the states at one time into those at the other."""

    def error(candidate: PairRotation) -> float:
        tables = _tables(candidate.angles, np.array([_PROBE_STEPS]), now.device)
        (rotated,) = candidate.rotate_(now[None].clone(), *tables)
        share = (rotated - later).abs() / (rotated.abs() + later.abs())
        return float(share.nan_to_num(0.0).float().mean())  # 0 / 0 is no error

    best = min(candidates, key=error)
    return best if error(best) <= _TOLERANCE else None
