"""Records to token ids, within the length limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from typing import TYPE_CHECKING

import numpy as np

from parallelmind.config import DataConfig
from parallelmind.data.encode import (
    append_eos,
    bos_ids,
    encode_continuations,
    encode_texts,
    eos_ids,
    prepend_bos,
)
from parallelmind.data.files import FilePart
from parallelmind.data.forks import write_forks
from parallelmind.data.packing import TokenRecord
from parallelmind.data.records import Record, Segment, Spans, TextOrIds
from parallelmind.data.survey import read_records
from parallelmind.errors import UserError
from parallelmind.fork_markers import ForkMarkers
from parallelmind.layout import Tokens
from parallelmind.tree import MAIN, Mask, Tree, context_lengths, with_context, with_readers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Encoded = tuple[list[int], Mask]  # of a segment: token ids, and whether each is a target

# For callers that keep every text whole.
NO_LIMITS = DataConfig(data_path="-", max_branch_tokens=1 << 62, max_sample_tokens=1 << 62)

_RECORDS_PER_CALL = 256  # records whose texts are encoded in one call of the tokenizer


@dataclass(frozen=True, slots=True)
class TokenisedRecord:
    """Token ids of one record, and what the length limits removed.

    tokens: None if no branch remains. standalone: as in `Record`. truncated: number of truncated segments.
    skipped: number of skipped branches and reduces.
    """

    tokens: Tokens | None
    standalone: bool
    truncated: int
    skipped: int

    def for_packing(self) -> Iterator[TokenRecord]:
        """The record as input of packing, or nothing if no branch remains."""
        if self.tokens is not None:
            yield TokenRecord(self.tokens, self.standalone)


def tokenise_part(
    part: FilePart, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> Iterator[TokenisedRecord]:
    """Every good record of a file part, tokenised. Bad lines are skipped; the survey reports them."""
    return tokenise_stream(read_records(part, data, len(tokenizer)), tokenizer, data)


def tokenise_stream(
    records: Iterator[Record], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> Iterator[TokenisedRecord]:
    """Tokenise a stream of records, many at a time."""
    while chunk := list(islice(records, _RECORDS_PER_CALL)):
        yield from tokenise(chunk, tokenizer, data)


def tokenise(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> list[TokenisedRecord]:
    """Tokenise many records, with two calls of the tokenizer: for texts that open a sample, and for others.

    Prompt and completion are tokenised separately, so encoding the prompt for decoding gives exactly the
    training prefix. Texts and completions end with the tokenizer's EOS, once, so that a model learns to stop;
    rendered texts and `input_ids` get no special token. A segment longer than `max_branch_tokens` is cut or
    skipped, as `overlong` and `truncate_side` say. It is also skipped if it exceeds `max_sample_tokens`
    together with all that it reads, if its targets end after it, and if neither it nor a segment that reads
    it has a target. What reads a skipped segment is skipped.
    """
    if markers := ForkMarkers.of(data.fork_markers):
        records = [write_forks(record, markers) for record in records]
    texts = [text for record in records for text in _texts(record)]
    encoded = _encode(tokenizer, texts)
    bos = bos_ids(tokenizer)
    eos = eos_ids(tokenizer)
    return [_apply_limits(record, _assemble(record, encoded, bos, eos), bos, data) for record in records]


def _texts(record: Record) -> Iterator[tuple[str, bool]]:
    """The texts in the order in which `_assemble` consumes their ids, and whether each opens a sample."""
    parts: list[tuple[TextOrIds | None, bool]] = [(record.main, True)]
    for segment, opens in _segments(record):
        parts += [(segment.body, opens), (segment.completion, opens and not segment.body)]
    return ((part, opens) for part, opens in parts if isinstance(part, str))


def _segments(record: Record) -> list[tuple[Segment, bool]]:
    """Every segment after main in pre-order, and whether it opens a sample, as a branch of an empty main."""
    opens = not record.main
    if record.is_flat:
        return [(branch, opens) for branch in record.branches]
    tree = record.tree
    is_first = tree.is_branch & (tree.parents == MAIN)
    return list(zip(record.walk(), (is_first[1:] & opens).tolist(), strict=True))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
    """The token ids of every text, in order; a text that opens no sample continues the one before it."""
    opening = iter(encode_texts(tokenizer, [text for text, opens in texts if opens]))
    continuing = iter(encode_continuations(tokenizer, [text for text, opens in texts if not opens]))
    return (next(opening if opens else continuing) for _, opens in texts)


def _assemble(record: Record, encoded: Iterator[list[int]], bos: list[int], eos: list[int]) -> list[_Encoded]:
    """The ids and targets of every segment, main first."""

    def ids_of(part: TextOrIds, first: bool) -> list[int]:
        if not isinstance(part, str):
            return part
        ids = next(encoded)
        return prepend_bos(ids, bos) if first else ids

    main = ids_of(record.main, first=bool(record.main))
    segments = [(main, np.zeros(len(main), bool))]
    for segment, opens in _segments(record):
        body = ids_of(segment.body, first=opens and not segment.rendered)
        targets, end = segment.targets, [] if segment.writes_fork else eos
        if segment.completion is not None:
            completion = append_eos(ids_of(segment.completion, first=False), end)
            ids, targets = body + completion, ((len(body), None),)
        else:
            ids = append_eos(body, end) if isinstance(segment.body, str) and not segment.rendered else body
        segments.append(_segment(ids, targets))
    return segments


def _segment(ids: list[int], targets: Spans) -> _Encoded:
    """The segment with these targets; if they end after it, without tokens, so that it is skipped."""
    if max((end or 0 for _, end in targets), default=0) > len(ids):
        ids, targets = [], ()
    mask = np.zeros(len(ids), bool)
    for start, end in targets:
        mask[start:end] = True
    return ids, mask


def _apply_limits(
    record: Record, segments: Sequence[_Encoded], bos: list[int], data: DataConfig
) -> TokenisedRecord:
    """Truncate and skip. The first token of a segment is never a target, as no token precedes it."""
    lengths = [len(ids) for ids, _ in segments]
    if (
        max(lengths) <= data.max_branch_tokens
        and sum(lengths) <= data.max_sample_tokens
        and all(targets[1:].any() for _, targets in segments[1:])
    ):
        return TokenisedRecord(_to_tokens(segments, record.tree), record.standalone, 0, 0)
    excess = [_excess(ids, targets, bos, data) for ids, targets in segments]
    cut = list(map(_without, segments, excess))
    kept = _kept(cut, np.array([places is None for places in excess]), record.tree, data.max_sample_tokens)
    remaining = list(compress(cut, kept))
    return TokenisedRecord(
        _to_tokens(remaining, record.tree.take(np.flatnonzero(kept))) if len(remaining) > 1 else None,
        record.standalone,
        truncated=sum(map(bool, compress(excess, kept))),
        skipped=len(kept) - max(len(remaining), 1),
    )


def _to_tokens(segments: Sequence[_Encoded], tree: Tree) -> Tokens:
    return Tokens.of_tree([ids for ids, _ in segments], tree, targets=[own for _, own in segments[1:]])


def _kept(segments: Sequence[_Encoded], too_long: Mask, tree: Tree, max_tokens: int) -> Mask:
    """`[segments]` the segments within the limits that have a target, and all that they read.

    Main is kept unless it is too long itself.
    """
    lengths = np.array([len(ids) for ids, _ in segments])
    exceeds = (np.array(context_lengths(lengths.tolist(), tree)) > max_tokens) | (lengths == 0)
    exceeds[MAIN] = False
    has_target = np.array([bool(targets[1:].any()) for _, targets in segments])
    kept = with_context(has_target & ~with_readers(too_long | exceeds, tree), tree)
    kept[MAIN] = not too_long[MAIN]
    return kept


def _without(segment: _Encoded, places: range | None) -> _Encoded:
    """The segment without the tokens at these places."""
    if not places:
        return segment
    ids, targets = segment
    return ids[: places.start] + ids[places.stop :], np.delete(targets, places)


def _excess(ids: list[int], targets: Mask, bos: list[int], data: DataConfig) -> range | None:
    """The places of the tokens to cut off, or None if the segment is to be skipped."""
    limit = data.max_branch_tokens
    if len(ids) <= limit:
        return range(0)
    if data.overlong == "skip":
        return None
    start = len(bos) if ids[: len(bos)] == bos else 0
    left = range(start, start + len(ids) - limit)
    if data.overlong == "keep_answer" and targets[1:].any():
        first_possible = left.stop if start else left.stop + 1  # a token precedes the first target
        return None if targets[:first_possible].any() else left
    return left if data.truncate_side == "left" else range(limit, len(ids))


def nothing_left(texts: int, data: DataConfig) -> UserError:
    """The error for data of which the length limits leave nothing. texts: number of branches and reduces."""
    keep_answer = "" if data.overlong == "keep_answer" else "set overlong=keep_answer, "
    return UserError(
        f"max_branch_tokens={data.max_branch_tokens} max_sample_tokens={data.max_sample_tokens} "
        f"overlong={data.overlong}: leave none of {texts:,} texts; "
        f"raise the limits, {keep_answer}or check the targets"
    )


def limit_notes(truncated: int, skipped: int, data: DataConfig, about: str = "") -> list[str]:
    """What the length limits remove, and what to change, in one line each. about: before an estimate."""
    limits, notes = f"max_branch_tokens={data.max_branch_tokens} overlong={data.overlong}", []
    if truncated:
        notes.append(
            f"{limits} truncate_side={data.truncate_side}: {about}{truncated:,} texts are too long and "
            "lose tokens; raise the limit, or choose another overlong or truncate_side"
        )
    if skipped:
        notes.append(
            f"{limits} max_sample_tokens={data.max_sample_tokens}: {about}{skipped:,} texts are "
            "skipped, too long or without a target in the limits; raise the limits, or check the targets"
        )
    return notes
