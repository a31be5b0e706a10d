"""Sequence groups without a tokenizer, for tests of scheduling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from parallelmind.config import RopeConfig
from parallelmind.engine.output import FinishReason
from parallelmind.engine.request import TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence import BranchState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.layout import Tokens
from parallelmind.tree import MAIN, Tree


class SilentOutput:
    """An output processor that shows no text and never finishes its branch."""

    matcher = None

    def process(self, token: int) -> tuple[str, FinishReason | None]:
        return "", None


class ReduceSpec(NamedTuple):
    """A reduce of main: its numbers of prompt tokens and of new tokens."""

    num_prompt: int
    max_new_tokens: int


def sequence_group(
    main: Sequence[int],
    prompts: Sequence[Sequence[int]],
    config: RopeConfig,
    max_new_tokens: int = 64,
    reduce: ReduceSpec | None = None,
    **identity: Any,
) -> SequenceGroup:
    """A group whose branches have started."""
    tokens, params = Tokens.of(main, prompts), [SamplingParams(max_new_tokens=max_new_tokens)] * len(prompts)
    if reduce is not None:
        tree = Tree.flat(len(prompts), has_reduce=True)
        tokens = Tokens.of_tree([*tokens.split(), [1] * reduce.num_prompt], tree)
        params = [*params, SamplingParams(max_new_tokens=reduce.max_new_tokens)]
    make_output: Any = lambda prompt, params: SilentOutput()  # noqa: E731
    group = SequenceGroup(TokenizedRequest(tokens, params), config, make_output, **identity)
    group.start_ready()
    return group


def add_branch(
    group: SequenceGroup, prompt: Sequence[int], parent: int = MAIN, **sampling: Any
) -> BranchState:
    """Add a branch to a segment, main by default; it starts if that has ended."""
    group.add(TokenizedRequest(Tokens.of([], [prompt]), [SamplingParams(**sampling)]), parent)
    group.start_ready()
    return group.branches[-1]


def has_started_reduce(group: SequenceGroup) -> bool:
    reduce = group.reduce_of(MAIN)
    return reduce is not None and reduce.has_started
