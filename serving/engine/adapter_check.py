"""Check an adapter before it is served: it must decode as it was trained."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

import parallelmind as pm
from parallelmind.config import Dtype, RopeConfig
from parallelmind.engine.decoding_check import decoding_distance
from parallelmind.engine.model_runner import Model

# Rounding that is allowed, as a share of the largest logit.
_FLOAT32_TOLERANCE = 5e-4
_HALF_PRECISION_TOLERANCE = 5e-2


def check_adapter(model: Model, tokenizer: PreTrainedTokenizerBase, config: RopeConfig, dtype: Dtype) -> None:
    """Compare cached decoding with one forward pass in the layout of training.

    Raises UserError if their logits differ by more than rounding in `dtype`.
    """
    tolerance = _FLOAT32_TOLERANCE if dtype == "float32" else _HALF_PRECISION_TOLERANCE
    distance = decoding_distance(model, tokenizer, config)
    if not distance <= tolerance:  # NaN is refused too
        raise pm.UserError(
            f"model: the adapter is refused: the logits of cached decoding differ from those of one forward "
            f"pass by {distance:.2g} of the largest logit, {tolerance:.2g} allowed; "
            f"train it with the installed versions"
        )
