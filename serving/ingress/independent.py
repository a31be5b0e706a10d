"""Prompts of one request as samples: independent of each other, or branches of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter

import parallelmind as pm
from parallelmind.config import Visibility
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.request import TokenizedRequest

_BRANCH_OF_MAIN, _MAIN_CONTINUED = 1, 0  # branch numbers


@dataclass(frozen=True, slots=True)
class PromptSamples:
    """Samples with a branch for every choice: first those of the first prompt.

    branch_number: as in `TokenizedRequest`.
    n: choices of each prompt.
    prompt_tokens: tokens of main and of all prompts.
    longest: tokens of main and of the longest prompt; of all prompts if they are read together.
    """

    samples: list[pm.Sample]
    branch_number: int | None
    n: int
    prompt_tokens: int
    longest: int

    @staticmethod
    def of(
        main: list[int],
        prompts: Sequence[list[int]],
        n: int,
        visibility: Visibility = "isolated",
        scores_prompts: bool = False,
    ) -> PromptSamples:
        """Prompts that each follow main, with n choices each. main may be empty.

        columnar: all choices are branches of one sample, which attend to each other as the adapter was
        trained. isolated: no choice depends on another one, and what the prompts share is read once.
        scores_prompts: whether log-probabilities of the prompts are computed: each is a whole branch then.
        """
        lengths = [len(prompt) for prompt in prompts]
        total, longest = len(main) + sum(lengths), len(main) + max(lengths)
        if visibility == "columnar":
            return PromptSamples([_sample(main, prompts, n)], None, n, total, total)
        if main:
            return PromptSamples([_sample(main, prompts, n)], _BRANCH_OF_MAIN, n, total, longest)
        samples = [_sample([], [prompt], n) for prompt in prompts] if scores_prompts else _split(prompts, n)
        return PromptSamples(samples, _MAIN_CONTINUED, n, total, longest)

    @classmethod
    def of_forks(
        cls, forks: Sequence[tuple[list[int], list[int]]], n: int, visibility: Visibility = "isolated"
    ) -> PromptSamples:
        """Prompts with a main each, as pairs. Those in a row with the same main are one sample."""
        if visibility == "columnar":
            main = common_beginning([main for main, _ in forks])
            return cls.of(main, [(own + rest)[len(main) :] for own, rest in forks], n, visibility)
        groups = [
            cls.of(main, [rest for _, rest in group], n) for main, group in groupby(forks, key=itemgetter(0))
        ]
        return cls(
            [sample for group in groups for sample in group.samples],
            _BRANCH_OF_MAIN,
            n,
            sum(group.prompt_tokens for group in groups),
            max(group.longest for group in groups),
        )

    def finish(self, sample: TokenizedRequest) -> TokenizedRequest:
        """A sample, tokenized, with what makes its branches independent."""
        if self.branch_number is None:
            return sample
        numbered = enumerate(sample.params)
        params = [replace(own, seed=_choice_seed(own.seed, index % self.n)) for index, own in numbered]
        return replace(sample, params=params, branch_number=self.branch_number)


def _split(prompts: Sequence[list[int]], n: int) -> list[pm.Sample]:
    """Samples whose branches continue the text of main.

    Prompts that begin alike are one sample, whose main is their beginning. Any other prompt is a sample of
    its own; if it has several choices, main is all but its last token.
    """
    shared = len(common_beginning([prompt[:-1] for prompt in prompts]))  # a branch begins with a token
    if shared >= BLOCK and len(prompts) > 1:
        return [_sample(prompts[0][:shared], [prompt[shared:] for prompt in prompts], n)]
    cuts = [len(prompt) - 1 if n > 1 else 0 for prompt in prompts]
    return [_sample(prompt[:cut], [prompt[cut:]], n) for prompt, cut in zip(prompts, cuts, strict=True)]


def _sample(main: list[int], prompts: Sequence[list[int]], n: int) -> pm.Sample:
    return pm.Sample(main, [prompt for prompt in prompts for _ in range(n)])


def common_beginning(texts: Sequence[list[int]]) -> list[int]:
    """The tokens that all texts begin with."""
    first, last = min(texts), max(texts)  # in lexicographic order: they share the least
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((index for index, (left, right) in pairs if left != right), len(first))]


def _choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of a choice. That of the first one is the seed of the request."""
    if seed is None or not choice:
        return seed
    return int.from_bytes(blake2b(f"{seed},{choice}".encode(), digest_size=8).digest()) >> 2
