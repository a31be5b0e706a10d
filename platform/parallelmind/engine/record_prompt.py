"""The part of a record that a model continues: its prompts, and its texts up to their first target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from parallelmind.data.encode import append_eos, encode_text, eos_ids
from parallelmind.data.records import Record, RecordError, Segment
from parallelmind.engine.request import Sample, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RecordPrompt:
    """A record without its answers.

    reduce: prompt of the reduce branch, if there is one. documents: the texts of the branches that are only
    read, by index; the sample holds them as the token ids of training.
    """

    sample: Sample
    reduce: Text | None = None
    documents: Mapping[int, Text] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Record, tokenizer: PreTrainedTokenizerBase) -> RecordPrompt:
        """The prompt of a record. Raises RecordError for nested branches."""
        check_depth(record)
        has_reduce = record.reduce is not None
        branches = [_prompt(branch, tokenizer, not record.main, has_reduce) for branch in record.branches]
        reduce = None if record.reduce is None else _prompt(record.reduce, tokenizer, False, has_reduce)
        return cls(
            Sample(record.main, [branch.text for branch in branches]),
            reduce.text if reduce and reduce.decodes else None,
            {
                index: segment.body
                for index, (segment, branch) in enumerate(zip(record.branches, branches, strict=True))
                if not branch.decodes
            },
        )

    @property
    def per_branch(self) -> list[dict[str, Any]]:
        """Settings of each branch, as `Engine.submit` takes them."""
        indices = range(len(self.sample.branches))
        return [{"max_new_tokens": 0} if index in self.documents else {} for index in indices]

    @property
    def branches(self) -> list[Text]:
        """Every branch as a reader knows it: its prompt, or the text of a document."""
        return [self.documents.get(index, text) for index, text in enumerate(self.sample.branches)]

    @property
    def num_outputs(self) -> int:
        """Number of branches, the reduce branch included."""
        return len(self.sample.branches) + (self.reduce is not None)

    @property
    def decoded(self) -> list[int]:
        """Indices of the outputs that are decoded, the reduce branch last."""
        return [index for index in range(self.num_outputs) if index not in self.documents]


class _Prompt(NamedTuple):
    """What a model reads of a segment, and whether it continues the segment."""

    text: Text
    decodes: bool


def check_depth(record: Record) -> None:
    """Raise RecordError for nested branches, which the engine does not decode."""
    places = [(f"branches[{index}]", branch) for index, branch in enumerate(record.branches)]
    for place, segment in [*places, ("reduce", record.reduce)]:
        if segment is not None and segment.branches:
            raise RecordError(
                f"{place} has branches, and decoding takes one level of branches and a reduce; "
                "leave the nested branches out"
            )


def _prompt(
    segment: Segment, tokenizer: PreTrainedTokenizerBase, opens_sample: bool, in_tree: bool
) -> _Prompt:
    """The prompt of a segment.

    opens_sample: whether the segment is a branch of an empty main. in_tree: whether the record has a reduce:
    a segment whose targets begin after its end is only read then. A flat one is continued at its end.
    """
    first_target = segment.targets[0][0] if segment.targets else None
    if segment.completion is not None or (first_target == 0 and not segment.rendered):
        return _Prompt(segment.body, True)
    ids = whole = segment.body
    if isinstance(segment.body, str):
        ids = encode_text(tokenizer, segment.body, opens_sample and not segment.rendered)
        whole = ids if segment.rendered else append_eos(ids, eos_ids(tokenizer))
    if first_target is None or (in_tree and first_target >= len(whole)):
        return _Prompt(whole, False)
    return _Prompt(ids[: first_target or None], True)
