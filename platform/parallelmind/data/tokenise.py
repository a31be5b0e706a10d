"""Records to token ids, within the length limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from parallelmind.config import DataConfig
from parallelmind.data.encode import append_eos, bos_ids, encode_continuations, encode_texts, prepend_bos
from parallelmind.data.files import FilePart
from parallelmind.data.packing import TokenRecord
from parallelmind.data.records import Record, Spans, TextOrIds
from parallelmind.data.survey import read_records
from parallelmind.errors import UserError
from parallelmind.layout import Tokens
from parallelmind.tree import Mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RECORDS_PER_CALL = 256  # records whose texts are encoded in one call of the tokenizer


@dataclass(frozen=True, slots=True)
class TokenisedRecord:
    """Token ids of one record, and what the length limits removed.

    tokens: None if no branch remains. standalone: as in `Record`. truncated: number of truncated mains and
    branches. skipped: number of skipped branches.
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
    rendered texts and `input_ids` get no special token. A main or branch longer than `max_branch_tokens` is
    cut or skipped, as `overlong` and `truncate_side` say. A branch without a target is skipped, and so is one
    that exceeds `max_sample_tokens` together with its main.
    """
    texts = [text for record in records for text in _texts(record)]
    encoded = _encode(tokenizer, texts)
    bos = bos_ids(tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        _apply_limits(*_assemble(record, encoded, bos, eos), record.standalone, bos, data)
        for record in records
    ]


def _texts(record: Record) -> Iterator[tuple[str, bool]]:
    """The texts in the order in which `_assemble` consumes their ids, and whether each opens a sample."""
    parts: list[tuple[TextOrIds | None, bool]] = [(record.main, True)]
    for branch in record.branches:
        opens = not record.main
        parts += [(branch.body, opens), (branch.completion, opens and not branch.body)]
    return ((part, opens) for part, opens in parts if isinstance(part, str))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
    """The token ids of every text, in order; a text that opens no sample continues the one before it."""
    opening = iter(encode_texts(tokenizer, [text for text, opens in texts if opens]))
    continuing = iter(encode_continuations(tokenizer, [text for text, opens in texts if not opens]))
    return (next(opening if opens else continuing) for _, opens in texts)


def _assemble(
    record: Record, encoded: Iterator[list[int]], bos: list[int], eos: list[int]
) -> tuple[list[int], list[tuple[list[int], Mask]]]:
    """The ids of main, and for every branch its ids and whether each is a target."""

    def ids_of(part: TextOrIds, first: bool) -> list[int]:
        if not isinstance(part, str):
            return part
        ids = next(encoded)
        return prepend_bos(ids, bos) if first else ids

    main = ids_of(record.main, first=bool(record.main))
    branches = []
    for branch in record.branches:
        body = ids_of(branch.body, first=not record.main and not branch.rendered)
        targets = branch.targets
        if branch.completion is not None:
            completion = append_eos(ids_of(branch.completion, first=False), eos)
            ids, targets = body + completion, ((len(body), None),)
        else:
            ids = append_eos(body, eos) if isinstance(branch.body, str) and not branch.rendered else body
        branches.append((ids, _mask_of_spans(len(ids), targets)))
    return main, branches


def _mask_of_spans(length: int, targets: Spans) -> Mask:
    """`[length]` whether a token lies in one of the spans; nothing does if a span exceeds the length."""
    mask = np.zeros(length, bool)
    if max(end or 0 for _, end in targets) <= length:
        for start, end in targets:
            mask[start:end] = True
    return mask


def _apply_limits(
    main: list[int],
    branches: list[tuple[list[int], Mask]],
    standalone: bool,
    bos: list[int],
    data: DataConfig,
) -> TokenisedRecord:
    """Truncate and skip. The first token of a branch is never a target, as no token precedes it."""
    excess = _excess(main, None, bos, data)
    if excess is None:
        return TokenisedRecord(None, standalone, 0, len(branches))
    main = main[: excess.start] + main[excess.stop :]
    kept, kept_targets, truncated = [], [], int(bool(excess))
    for ids, targets in branches:
        excess = _excess(ids, targets, bos, data)
        if excess is None:
            continue
        if excess:
            ids, targets = ids[: excess.start] + ids[excess.stop :], np.delete(targets, excess)
        if not targets[1:].any() or len(main) + len(ids) > data.max_sample_tokens:
            continue
        kept.append(ids)
        kept_targets.append(targets)
        truncated += bool(excess)
    tokens = Tokens.of(main, kept, targets=kept_targets) if kept else None
    return TokenisedRecord(tokens, standalone, truncated, len(branches) - len(kept))


def _excess(ids: list[int], targets: Mask | None, bos: list[int], data: DataConfig) -> range | None:
    """The places of the tokens to cut off, or None if the main or branch is to be skipped.

    targets: of a branch; None for main.
    """
    limit = data.max_branch_tokens
    if len(ids) <= limit:
        return range(0)
    if data.overlong == "skip":
        return None
    start = len(bos) if ids[: len(bos)] == bos else 0
    left = range(start, start + len(ids) - limit)
    if data.overlong == "keep_answer" and targets is not None:
        first_possible = left.stop if start else left.stop + 1  # a token precedes the first target
        return None if targets[:first_possible].any() else left
    return left if data.truncate_side == "left" else range(limit, len(ids))


def nothing_left(branches: int, data: DataConfig) -> UserError:
    """The error for data of which the length limits leave nothing. branches: the number of skipped ones."""
    keep_answer = "" if data.overlong == "keep_answer" else "set overlong=keep_answer, "
    return UserError(
        f"max_branch_tokens={data.max_branch_tokens} max_sample_tokens={data.max_sample_tokens} "
        f"overlong={data.overlong}: leave none of {branches:,} branches; "
        f"raise the limits, {keep_answer}or check the targets"
    )


def limit_notes(truncated: int, skipped: int, data: DataConfig, about: str = "") -> list[str]:
    """What the length limits remove, and what to change, in one line each. about: before an estimate."""
    limits, notes = f"max_branch_tokens={data.max_branch_tokens} overlong={data.overlong}", []
    if truncated:
        notes.append(
            f"{limits} truncate_side={data.truncate_side}: {about}{truncated:,} mains and branches are too "
            "long and lose tokens; raise the limit, or choose another overlong or truncate_side"
        )
    if skipped:
        notes.append(
            f"{limits} max_sample_tokens={data.max_sample_tokens}: {about}{skipped:,} branches are "
            "skipped, too long or without a target in the limits; raise the limits, or check the targets"
        )
    return notes
