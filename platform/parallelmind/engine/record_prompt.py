"""The part of a record that a model continues: its prompts, and its texts up to their first target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from parallelmind.data import records
from parallelmind.data.encode import append_eos, encode_text, eos_ids
from parallelmind.engine.request import Sample, Segment, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RecordPrompt:
    """A record without its answers.

    documents: the texts of the segments that are only read, by index; the sample holds them as the token ids
    of training, and decodes nothing of them. Indices count the segments after main in pre-order.
    """

    sample: Sample
    documents: Mapping[int, Text] = field(default_factory=dict)

    @classmethod
    def of(cls, record: records.Record, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The prompt of a record. A reduce is left out if nothing of it is decoded."""
        builder = _Builder(tokenizer, in_tree=not record.is_flat)
        branches, reduce, texts = builder.below(record, opens_sample=not record.main)
        documents = {index: text for index, text in enumerate(texts) if text is not None}
        sample = Sample(
            record.main,
            branches[record.documents :],
            reduce,
            [branch.text for branch in branches[: record.documents]],
        )
        return cls(sample, documents)

    def with_reduce(self, reduce: Text | None) -> Self:
        """The prompt with this reduce, unless it has one or `reduce` is None."""
        if reduce is None or self.sample.reduce is not None:
            return self
        return replace(self, sample=replace(self.sample, reduce=reduce))

    @property
    def num_outputs(self) -> int:
        """Number of segments after main."""
        return sum(1 for _ in self.sample.walk())

    @property
    def decoded(self) -> list[int]:
        """Indices of the segments that are decoded."""
        return [index for index in range(self.num_outputs) if index not in self.documents]

    def to_row(self) -> dict[str, Any]:
        """The record as a reader knows it: prompts, and the texts of documents."""
        remaining, num_documents = iter(range(self.num_outputs)), len(self.sample.documents)
        documents = [self.documents[next(remaining)] for _ in range(num_documents)]
        shown = {"documents": documents} if documents else {}
        return {"main": self.sample.main, **shown, **self._below(self.sample, remaining)}

    def _below(self, fork: Sample | Segment, remaining: Iterator[int]) -> dict[str, Any]:
        """Branches and reduce of a segment. remaining: the indices from its first branch on."""
        row: dict[str, Any] = {}
        if len(fork.branches):
            row["branches"] = [self._shown(branch, remaining) for branch in fork.branches]
        if fork.reduce is not None:
            row["reduce"] = self._shown(fork.reduce, remaining)
        return row

    def _shown(self, given: Text | Segment, remaining: Iterator[int]) -> Text | dict[str, Any]:
        segment = given if isinstance(given, Segment) else Segment(given)
        text = self.documents.get(next(remaining), segment.text)
        below = self._below(segment, remaining)
        return {"text": text, **below} if below else text


class _Builder:
    """Makes the segments of a sample from those of a record.

    in_tree: whether the record has a reduce or nested branches. A segment whose targets begin after its end
    is only read then. A flat one is continued at its end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, in_tree: bool) -> None:
        self._tokenizer, self._in_tree = tokenizer, in_tree

    def below(
        self, fork: records.Record | records.Segment, opens_sample: bool = False
    ) -> tuple[list[Segment], Segment | None, list[Text | None]]:
        """Branches and reduce, and for each segment of them, in pre-order, its text if it is only read.

        opens_sample: whether the branches follow an empty main.
        """
        branches, texts = [], list[Text | None]()
        for recorded in fork.branches:
            segment, own = self._segment(recorded, opens_sample)
            branches.append(segment)
            texts += own
        if fork.reduce is not None:
            reduce, own = self._segment(fork.reduce)
            if None in own:
                return branches, reduce, texts + own
        return branches, None, texts

    def _segment(
        self, recorded: records.Segment, opens_sample: bool = False
    ) -> tuple[Segment, list[Text | None]]:
        text, decodes = self._prompt(recorded, opens_sample)
        branches, reduce, texts = self.below(recorded)
        segment = Segment(text, branches, reduce, {} if decodes else {"max_new_tokens": 0})
        return segment, [None if decodes else recorded.body, *texts]

    def _prompt(self, segment: records.Segment, opens_sample: bool) -> tuple[Text, bool]:
        """What a model reads of a segment, and whether it continues the segment."""
        first_target = segment.targets[0][0] if segment.targets else None
        if segment.completion is not None or (first_target == 0 and not segment.rendered):
            return segment.body, True
        ids = whole = segment.body
        if isinstance(segment.body, str):
            ids = encode_text(self._tokenizer, segment.body, opens_sample and not segment.rendered)
            whole = ids if segment.rendered else append_eos(ids, eos_ids(self._tokenizer))
        if first_target is None or (self._in_tree and first_target >= len(whole)):
            return whole, False
        return ids[: first_target or None], True
