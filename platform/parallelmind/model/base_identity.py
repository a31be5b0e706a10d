"""What identifies the base model of an adapter beyond its shapes: weights, computation, end token."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from parallelmind.config import FrozenConfig

if TYPE_CHECKING:  # processes that only read a manifest do not import a model library
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Value = TypeVar("Value")

_VALUES = 8  # of each weight
_SAMPLE = "_base_weight_sample"
# What peft inserts into the names of a base's weights, and the names of those that it adds.
_INSERTED = re.compile(r"\.(base_layer|token_adapter|original_module)\b")
_ADDED = re.compile(r"\.(lora_\w+|trainable_tokens_\w+|modules_to_save|sibling_penalty|branch_embedding)\b")
_RELATIVE, _ABSOLUTE = 2.0**-7, 1e-6  # by which rounding to another dtype may change a value

# Fields of the configuration that change what the same weights compute. A model has some of them.
_COMPUTATION = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "norm_eps",
    "layer_types",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "scale_attn_weights",
    "use_parallel_residual",
    "parallel_attn",
    "num_experts_per_tok",
    "norm_topk_prob",
)


class BaseIdentity(FrozenConfig):
    """Facts about a base model that a manifest records and that loading compares."""

    eos_token_id: int | None = Field(description="end token of the tokenizer")
    tie_word_embeddings: bool = Field(description="whether input and output embeddings are one weight")
    dtype: str = Field(description="dtype that the base was loaded in")
    computation: dict[str, Any] | None = Field(
        None,
        description="activation, epsilon of norms, types of layers and the like, by their names in "
        "config.json; null in adapters of earlier versions",
    )
    weights: dict[str, list[float]] = Field(
        description="values at fixed places of every weight that is not quantised, by name; of eight "
        "matrices in adapters of earlier versions"
    )

    def differences(self, other: BaseIdentity) -> list[tuple[str, str, str]]:
        """What differs: its name, the value here and the value there.

        Weights of another dtype are compared up to rounding. Weights that only one of the two has, because
        its other weights are quantised, are passed over, and so are settings that a version of transformers
        does not have.
        """
        differences = [
            (name, str(getattr(self, field)), str(getattr(other, field)))
            for name, field in (("end token", "eos_token_id"), ("tie_word_embeddings", "tie_word_embeddings"))
            if getattr(self, field) != getattr(other, field)
        ]
        differences += self._computation_differences(other)
        for name in filter(other.weights.__contains__, self.weights):
            if unequal := self._unequal_values(name, other):
                here, there = unequal[0]
                return [*differences, (f"weight {name}", f"{here:.6g}", f"{there:.6g}")]
        return differences

    def _computation_differences(self, other: BaseIdentity) -> Iterator[tuple[str, str, str]]:
        here, there = self.computation or {}, other.computation or {}
        for name in filter(there.__contains__, here):
            if isinstance(here[name], list) and isinstance(there[name], list):
                pairs = zip(here[name], there[name], strict=False)  # as many layers: a part of the shapes
                yield from ((f"{name}[{i}]", str(a), str(b)) for i, (a, b) in enumerate(pairs) if a != b)
            elif here[name] != there[name]:
                yield name, str(here[name]), str(there[name])

    def _unequal_values(self, name: str, other: BaseIdentity) -> list[tuple[float, float]]:
        """Pairs of values that are not of one number, rounded to the dtypes of the two models.

        Between two dtypes, a single value of a weight may differ by rounding: new tokens start at a mean.
        """
        pairs = list(zip(self.weights[name], other.weights[name], strict=True))
        coarser = {self.dtype, other.dtype} - {"float32"} or {"float32"}
        unequal = [pair for pair in pairs if not any(_equal(*pair, dtype) for dtype in coarser)]
        far = [pair for pair in unequal if not math.isclose(*pair, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)]
        return unequal if self.dtype == other.dtype or far or len(unequal) > 1 else []


def _equal(here: float, there: float, dtype: str) -> bool:
    """Whether both numbers are the same in a dtype, or neither is a number."""
    import torch

    pair = torch.tensor([here, there], dtype=getattr(torch, dtype))
    return bool(pair[0] == pair[1] or pair.isnan().all())


def base_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> BaseIdentity:
    """The identity of a base model, to which adapters of peft may have been added."""
    config = model.config.get_text_config(decoder=True)
    settings = config.to_dict()  # reading an attribute that differs between layers raises
    return BaseIdentity(
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=bool(settings.get("tie_word_embeddings", False)),
        dtype=str(model.dtype).removeprefix("torch."),
        computation={name: settings[name] for name in _COMPUTATION if settings.get(name) is not None},
        weights=sample_weights(model),
    )


def sample_weights(model: PreTrainedModel) -> dict[str, list[float]]:
    """Some values of every weight that is not quantised, by name.

    Neither the files that the weights came from nor their dtype change the sample, but for rounding. The
    first call remembers it on the model: PiSSA changes weights.
    """
    if not hasattr(model, _SAMPLE):
        weights = of_base(model.named_parameters())
        sampled = {name: _values(weight) for name, weight in weights if weight.is_floating_point()}
        setattr(model, _SAMPLE, sampled)
    sample: dict[str, list[float]] = getattr(model, _SAMPLE)
    return sample


def of_base(named: Iterable[tuple[str, Value]]) -> Iterator[tuple[str, Value]]:
    """The base's among the weights of a model, by their names without an adapter."""
    return ((_INSERTED.sub("", name), weight) for name, weight in named if not _ADDED.search(name))


def _values(weight: nn.Parameter) -> list[float]:
    from parallelmind.model.shards import values_at

    values: list[float] = values_at(weight, _spread(range(weight.numel()), _VALUES)).tolist()
    return values


def _spread(items: Any, count: int) -> list[Any]:
    """At most `count` items at even distances, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
