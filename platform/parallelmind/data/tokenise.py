"""Records to token ids, within the length limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from parallelmind.config import DataConfig
from parallelmind.data.encode import bos_ids, encode_texts, prepend_bos
from parallelmind.data.files import FilePart
from parallelmind.data.packing import TokenRecord
from parallelmind.data.records import Record, Spans, TextOrIds
from parallelmind.data.survey import read_records
from parallelmind.layout import Mask, Tokens

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
    part: FilePart, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[TokenisedRecord]:
    """Every good record of a file part, tokenised. Bad lines are skipped; the survey reports them."""
    return tokenise_stream(read_records(part, config, len(tokenizer)), tokenizer, config)


def tokenise_stream(
    records: Iterator[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[TokenisedRecord]:
    """Tokenise a stream of records, many at a time."""
    while chunk := list(islice(records, _RECORDS_PER_CALL)):
        yield from tokenise(chunk, tokenizer, config)


def tokenise(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[TokenisedRecord]:
    """Tokenise many records, with one call of the tokenizer.

    Prompt and completion are tokenised separately, so encoding the prompt for decoding gives exactly the
    training prefix. Texts and completions end with the tokenizer's EOS, so that a model learns to stop;
    rendered texts and `input_ids` get no special token. A main or branch longer than `max_branch_tokens` is
    truncated on the right or skipped. A branch without a target is skipped, and so is one that exceeds
    `max_sample_tokens` together with its main.
    """
    texts = [text for record in records for text in _texts(record)]
    encoded = iter(encode_texts(tokenizer, texts))
    bos = bos_ids(tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        _apply_limits(*_assemble(record, encoded, bos, eos), record.standalone, config) for record in records
    ]


def _texts(record: Record) -> Iterator[str]:
    """The texts of a record, in the order in which `_assemble` consumes their ids."""
    branch_parts = (part for branch in record.branches for part in (branch.body, branch.completion))
    for part in (record.main, *branch_parts):
        if isinstance(part, str):
            yield part


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
        body = ids_of(branch.body, first=not main and not branch.rendered)
        targets = branch.targets
        if branch.completion is not None:
            ids, targets = body + ids_of(branch.completion, first=False) + eos, ((len(body), None),)
        else:
            ids = body + eos if isinstance(branch.body, str) and not branch.rendered else body
        branches.append((ids, _target_mask(len(ids), targets)))
    return main, branches


def _target_mask(length: int, targets: Spans) -> Mask:
    """`[length]` whether a token lies in one of the spans; nothing does if a span exceeds the length."""
    mask = np.zeros(length, bool)
    if max(end or 0 for _, end in targets) <= length:
        for start, end in targets:
            mask[start:end] = True
    return mask


def _apply_limits(
    main: list[int], branches: list[tuple[list[int], Mask]], standalone: bool, config: DataConfig
) -> TokenisedRecord:
    """Truncate and skip. The first token of a branch is never a target, as no token precedes it."""
    limit = config.max_branch_tokens
    main_too_long = len(main) > limit
    if main_too_long and config.overlong == "skip":
        return TokenisedRecord(None, standalone, 0, len(branches))
    main = main[:limit]
    kept, kept_targets, truncated = [], [], int(main_too_long)
    for ids, targets in branches:
        too_long = len(ids) > limit
        if too_long and config.overlong == "skip":
            continue
        ids, targets = ids[:limit], targets[:limit]
        if not targets[1:].any() or len(main) + len(ids) > config.max_sample_tokens:
            continue
        kept.append(ids)
        kept_targets.append(targets)
        truncated += too_long
    tokens = Tokens.of(main, kept, targets=kept_targets) if kept else None
    return TokenisedRecord(tokens, standalone, truncated, len(branches) - len(kept))
