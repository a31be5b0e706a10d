"""What identifies the base model of an adapter beyond its architecture: some weights, tying, end token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from parallelmind.config import FrozenConfig

if TYPE_CHECKING:  # processes that only read a manifest do not import a model library
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_WEIGHTS, _VALUES = 8, 8  # weights that are sampled, and values of each
_SAMPLE = "_base_weight_sample"
_RELATIVE, _ABSOLUTE = 2.0**-7, 1e-6  # by which rounding to another dtype may change a value


class BaseIdentity(FrozenConfig):
    """Facts about a base model that a manifest records and that loading compares."""

    eos_token_id: int | None = Field(description="end token of the tokenizer")
    tie_word_embeddings: bool = Field(description="whether input and output embeddings are one weight")
    dtype: str = Field(description="dtype that the base was loaded in")
    weights: dict[str, list[float]] = Field(description="values at fixed places of some weights, by name")

    def differences(self, other: BaseIdentity) -> list[tuple[str, str, str]]:
        """What differs: its name, the value here and the value there.

        Weights of another dtype are compared up to rounding. Weights that only one of the two has, because
        its other weights are quantised, are passed over.
        """
        differences = [
            (name, str(getattr(self, field)), str(getattr(other, field)))
            for name, field in (("end token", "eos_token_id"), ("tie_word_embeddings", "tie_word_embeddings"))
            if getattr(self, field) != getattr(other, field)
        ]
        for name in filter(other.weights.__contains__, self.weights):
            for here, there in zip(self.weights[name], other.weights[name], strict=True):
                if not self._equal(here, there, other):
                    return [*differences, (f"weight {name}", f"{here:.4g}", f"{there:.4g}")]
        return differences

    def _equal(self, here: float, there: float, other: BaseIdentity) -> bool:
        if self.dtype == other.dtype:
            return here == there or (math.isnan(here) and math.isnan(there))
        return math.isclose(here, there, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def base_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> BaseIdentity:
    """The identity of a base model, to which adapters may have been added after `sample_weights`."""
    return BaseIdentity(
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)),
        dtype=str(model.dtype).removeprefix("torch."),
        weights=sample_weights(model),
    )


def sample_weights(model: PreTrainedModel) -> dict[str, list[float]]:
    """Some values of up to eight matrices that are not quantised, by name.

    The first call remembers them on the model: adapters rename weights, and PiSSA changes them.
    """
    if not hasattr(model, _SAMPLE):
        matrices = [
            (name, weight)
            for name, weight in model.named_parameters()
            if weight.dim() >= 2 and weight.is_floating_point()
        ]
        chosen = _spread(matrices, _MAX_WEIGHTS)
        setattr(model, _SAMPLE, {name: _values(weight) for name, weight in chosen})
    sample: dict[str, list[float]] = getattr(model, _SAMPLE)
    return sample


def _values(weight: Any) -> list[float]:
    flat = weight.detach().reshape(-1)
    values: list[float] = flat[_spread(range(flat.numel()), _VALUES)].float().tolist()
    return values


def _spread(items: Any, count: int) -> list[Any]:
    """At most `count` items at even distances, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
