"""Requests to an engine: samples as texts and as token ids, and the progress of a resumed one. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from parallelmind.config.other_names import NamedFields
from parallelmind.data.records import MAX_DEPTH
from parallelmind.engine.block_manager import blocks_for
from parallelmind.engine.output import FinishReason
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.errors import UserError, short_repr
from parallelmind.layout import Tokens
from parallelmind.tree import MAIN, GrowingTree

Text = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Segment(NamedFields):
    """A branch or a reduce with settings of its own, and what follows it.

    text: its prompt, as text or as token ids.
    branches: they begin where the segment ends.
    reduce: continues the segment when its branches, and all that follows them, have ended; it reads them all.
    sampling: fields of `SamplingParams`, which override those of the sample; `{"max_new_tokens": 0}` for a
        text that is only read.
    Raises UserError for branches that are not a list, a reduce without branches, and settings that are not a
    mapping.
    """

    text: Text
    branches: Sequence[Text | Segment] = ()
    reduce: Text | Segment | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_fork(self.branches, self.reduce)
        if not isinstance(self.sampling, Mapping):
            raise UserError(f"sampling={short_repr(self.sampling)}: give a mapping of sampling settings")


@dataclass(frozen=True, slots=True)
class Sample(NamedFields):
    """A main (may be empty), the documents and branches that share it, and a reduce that reads them all.

    A branch or a reduce is a text, token ids, or a `Segment`. Lists may be arrays.
    documents: texts or token ids that are only read, by the reduce. A document reads itself alone, so that
        its keys and values are found again whatever stands beside it.
    Raises UserError as `Segment` does, and for documents that are not a list.
    """

    main: Text = ""
    branches: Sequence[Text | Segment] = ()
    reduce: Text | Segment | None = None
    documents: Sequence[Text] = ()

    def __post_init__(self) -> None:
        if not is_list(self.documents):
            raise UserError(f"documents={short_repr(self.documents)}: give a list of texts")
        _check_fork(self.branches, None if len(self.documents) else self.reduce)

    def with_documents(self, documents: Sequence[Text]) -> Sample:
        """The sample with these documents, if there are any.

        Raises UserError for documents that are not a list, and for a sample that has others.
        """
        if len(documents) and len(self.documents):
            raise UserError(f"documents={short_repr(documents)}: the sample has documents; give one of them")
        return replace(self, documents=documents) if len(documents) else self

    def walk(self) -> Iterator[PlacedSegment]:
        """Every segment after main in pre-order, which is the order of their numbers.

        Documents come first. Raises UserError for branches that are nested too deeply.
        """
        for index, text in enumerate(self.documents):
            read_only = Segment(text, sampling={"max_new_tokens": 0})
            yield PlacedSegment(1 + index, MAIN, False, f"documents[{index}]", read_only)
        yield from _walk(self, MAIN, len(self.documents), "", 1)


class PlacedSegment(NamedTuple):
    """A segment of a sample. number, parent: 0 for main. place: such as `branches[1].reduce`."""

    number: int
    parent: int
    is_reduce: bool
    place: str
    segment: Segment


def _walk(fork: Sample | Segment, number: int, last: int, prefix: str, depth: int) -> Iterator[PlacedSegment]:
    """What follows a segment. number: of it. last: the number given last. depth: of its branches."""
    below = [(f"{prefix}branches[{index}]", branch) for index, branch in enumerate(fork.branches)]
    if below and depth > MAX_DEPTH:
        raise UserError(f"branches: are nested more than {MAX_DEPTH} deep; nest fewer of them")
    if fork.reduce is not None:
        below.append((f"{prefix}reduce", fork.reduce))
    for index, (place, given) in enumerate(below):
        segment = given if isinstance(given, Segment) else Segment(given)
        placed = PlacedSegment(last + 1, number, index == len(fork.branches), place, segment)
        yield placed
        last = placed.number
        for inner in _walk(segment, placed.number, last, f"{place}.", depth + 1):
            yield inner
            last = inner.number


def _check_fork(branches: Any, reduce: Any) -> None:
    """Raise UserError for branches that are not a list, and for a reduce without branches."""
    if not is_list(branches):
        raise UserError(f"branches={short_repr(branches)}: give a list of texts, one per branch")
    if reduce is not None and not len(branches):
        raise UserError(f"reduce={short_repr(reduce)}: has no branches to read; give branches, or no reduce")


def is_list(value: object) -> bool:
    """Whether a value is a sequence of items, or an array with dimensions. Text and bytes are not."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0


@dataclass(frozen=True, slots=True)
class TokenizedRequest:
    """A sample as token ids.

    params: the sampling parameters of every segment after main.
    branch_number: None if the branches are siblings: each has a number of its own, and the model's visibility
        holds. With a number they are independent: each is decoded as if it were the only branch, with the
        branch coordinate of this number: 1 for a branch of main, 0 for one that continues the text of main.
    """

    tokens: Tokens
    params: list[SamplingParams]
    branch_number: int | None = None

    @property
    def num_documents(self) -> int:
        """Documents, which are the first segments after main."""
        return self.tokens.tree.documents

    @property
    def num_branches(self) -> int:
        """Segments after main: branches and reduces at all depths."""
        return len(self.params)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of main and of all prompts."""
        return len(self.tokens.ids)

    @property
    def max_new_tokens(self) -> int:
        """Upper bound of the new tokens of all segments together."""
        return sum(params.max_new_tokens for params in self.params)

    def as_trained(self) -> TokenizedRequest:
        """The request whose only branch is no independent one, if that changes nothing but what follows it.

        What it forks into is decoded with the model's own visibility then, also if it has forked already.
        """
        has_main = bool(self.tokens.lengths[MAIN])
        is_alone = np.count_nonzero(self.tokens.tree.parents[1:] == MAIN) == 1
        return replace(self, branch_number=None) if is_alone and self.branch_number == has_main else self

    def without_forks(self) -> TokenizedRequest:
        """The request whose segments do not fork by themselves."""
        return replace(self, params=[replace(own, max_fork_branches=0) for own in self.params])

    def divide(self, max_blocks: int) -> list[TokenizedRequest]:
        """Samples of independent branches that each fill at most this many cache blocks, if that is possible.

        The branches keep their order. Siblings stay in one sample.
        """
        if self.branch_number is None:
            return [self]
        lengths = self.tokens.lengths
        blocks = [
            blocks_for(int(length) + params.max_new_tokens)
            for length, params in zip(lengths[1:], self.params, strict=True)
        ]
        starts, used = [0], blocks_for(int(lengths[MAIN]))
        left = max_blocks - used
        for index, count in enumerate(blocks):
            if count > left and index > starts[-1]:
                starts.append(index)
                left = max_blocks - used
            left -= count
        bounds = list(pairwise([*starts, len(blocks)]))
        return [self] if len(bounds) == 1 else [self._part(start, end) for start, end in bounds]

    def _part(self, start: int, end: int) -> TokenizedRequest:
        """The sample of main and some of its branches."""
        kept = np.array([MAIN, *range(start + 1, end + 1)])
        return replace(self, tokens=self.tokens.take(kept), params=self.params[start:end])

    def extend(
        self, added: TokenizedRequest, parent: int = MAIN, as_reduce: bool = False
    ) -> TokenizedRequest:
        """The request with the segments of another one, without its main, below a segment.

        They get the next numbers. parent: number of the segment.
        as_reduce: whether the only branch of `added` is the reduce of that segment.
        """
        tree, new = self.tokens.tree, added.tokens.tree
        last, is_below = tree.segments - 1, new.parents[1:] != MAIN
        grown = GrowingTree(
            np.append(tree.parents, np.where(is_below, last + new.parents[1:], parent)),
            np.append(tree.is_reduce, new.is_reduce[1:] | (as_reduce & ~is_below)),
            tree.documents,
        )
        tokens = Tokens.of_tree([*self.tokens.split(), *added.tokens.split()[1:]], grown)
        return replace(self, tokens=tokens, params=[*self.params, *added.params])


class AddedSegments(NamedTuple):
    """Segments that were added to a running sample: those of a request, without its main.

    parent: number of the segment that they continue; 0 for main.
    as_reduce: whether the request's only branch is the reduce of that segment.
    key: of the call that added them; None for a fork that the model wrote.
    """

    request: TokenizedRequest
    parent: int
    as_reduce: bool = False
    key: str | None = None

    def extend(self, sample: TokenizedRequest) -> TokenizedRequest:
        """The sample with these segments, which get the next numbers."""
        return sample.extend(self.request, self.parent, self.as_reduce)


@dataclass(frozen=True, slots=True)
class ResumeState:
    """Progress of a sample on another engine, from which this engine resumes it.

    The lists have one entry for each segment after main, in the order of their numbers.

    start_times: time coordinate of the first token; None for a segment that has not started, or whose start
    follows from the others.
    token_ids: decoded tokens.
    finish_reasons: None for a segment that has not finished.
    """

    start_times: list[int | None]
    token_ids: list[list[int]]
    finish_reasons: list[FinishReason | None]

    @property
    def is_complete(self) -> bool:
        """Whether every segment has finished."""
        return all(self.finish_reasons)

    def part(self, start: int, end: int) -> ResumeState:
        """The progress of the segments with these indices."""
        return ResumeState(
            self.start_times[start:end], self.token_ids[start:end], self.finish_reasons[start:end]
        )
