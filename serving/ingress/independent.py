"""Independent prompts as samples: no answer depends on the others, and what prompts share is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import parallelmind as pm
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.request import TokenizedRequest

BRANCH_OF_MAIN, MAIN_CONTINUED = 1, 0  # branch numbers


def split_prompts(prompts: Sequence[list[int]], n: int) -> list[pm.Sample]:
    """Samples whose branches continue the text of main: every prompt n times.

    Prompts that begin alike are one sample, whose main is their beginning. Any other prompt is a sample of
    its own; if it has several choices, main is all but its last token.
    """
    shared = _num_shared(prompts)
    if shared >= BLOCK and len(prompts) > 1:
        return [_sample(prompts, shared, n)]
    return [_sample([prompt], len(prompt) - 1 if n > 1 else 0, n) for prompt in prompts]


def _num_shared(prompts: Sequence[list[int]]) -> int:
    """Number of tokens that all prompts begin with; each has one token more at least."""
    beginnings = [prompt[:-1] for prompt in prompts]
    first, last = min(beginnings), max(beginnings)  # in lexicographic order: they share the least
    pairs = enumerate(zip(first, last, strict=False))
    return next((index for index, (left, right) in pairs if left != right), len(first))


def _sample(prompts: Sequence[list[int]], num_main: int, n: int) -> pm.Sample:
    return pm.Sample(prompts[0][:num_main], [prompt[num_main:] for prompt in prompts for _ in range(n)])


def as_independent(sample: TokenizedRequest, branch_number: int, n: int) -> TokenizedRequest:
    """The sample with independent branches, of which n neighbours are the choices of one prompt."""
    numbered = enumerate(sample.params)
    params = [replace(own, seed=_choice_seed(own.seed, index % n)) for index, own in numbered]
    return replace(sample, params=params, branch_number=branch_number)


def _choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of a choice. That of the first one is the seed of the request."""
    if seed is None or not choice:
        return seed
    return int.from_bytes(blake2b(f"{seed},{choice}".encode(), digest_size=8).digest()) >> 2
