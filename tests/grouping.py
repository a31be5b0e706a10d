"""Sequence groups without a tokenizer, for tests of scheduling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallelmind.config import RopeConfig
from parallelmind.engine.output import FinishReason
from parallelmind.engine.request import ReduceSpec, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.layout import Tokens


class SilentOutput:
    """An output processor that shows no text and never finishes its branch."""

    def process(self, token: int) -> tuple[str, FinishReason | None]:
        return "", None


def sequence_group(
    main: Sequence[int],
    prompts: Sequence[Sequence[int]],
    config: RopeConfig,
    max_new_tokens: int = 64,
    reduce: ReduceSpec | None = None,
) -> SequenceGroup:
    params = [SamplingParams(max_new_tokens=max_new_tokens)] * len(prompts)
    make_output: Any = lambda prompt, params: SilentOutput()  # noqa: E731
    return SequenceGroup(TokenizedRequest(Tokens.of(main, prompts), params, reduce), config, make_output)


def reduce_spec(num_prompt: int, max_new_tokens: int) -> ReduceSpec:
    return ReduceSpec([1] * num_prompt, SamplingParams(max_new_tokens=max_new_tokens))
