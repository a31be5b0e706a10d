"""Records to `layout.Tokens`, within the length limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig
from parallelmind.data.encode import encode_texts, opened_by, opening
from parallelmind.data.records import Piece, Record
from parallelmind.layout import Tokens


@dataclass(frozen=True, slots=True)
class Tokenised:
    """tokens: None where no branch is left. truncated: mains and branches that were cut. skipped: branches
    left out.
    """

    tokens: Tokens | None
    truncated: int
    skipped: int


_TOGETHER = 256  # records whose texts are encoded in one call


def tokenised(
    records: Iterator[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[tuple[Record, Tokenised]]:
    """Each record of a stream with its token ids."""
    while held := list(islice(records, _TOGETHER)):
        yield from zip(held, tokenise(held, tokenizer, config), strict=True)


def tokenise(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[Tokenised]:
    """Token ids of many records, their texts encoded in one call.

    Prompt and completion are tokenised apart, so decoding the prompt gives exactly the training prefix. Text
    and completions end with the tokenizer's EOS, so that a model learns to stop; `input_ids` are taken as
    they are. A main or branch over `max_branch_tokens` is cut from the right or skipped; a branch without a
    target is skipped, and so is one that would not fit into `max_sample_tokens` beside its main.
    """
    texts = [text for record in records for text in _texts(record)]
    encoded = iter(encode_texts(tokenizer, texts))
    bos = opening(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [_fitted(*_encoded(record, encoded, bos, end), config) for record in records]


def _texts(record: Record) -> Iterator[str]:
    """The texts of a record, in the order in which `_encoded` takes them."""
    for piece in (
        record.main,
        *(piece for branch in record.branches for piece in (branch.body, branch.completion)),
    ):
        if isinstance(piece, str):
            yield piece


def _encoded(
    record: Record, encoded: Iterator[list[int]], bos: list[int], end: list[int]
) -> tuple[list[int], list[tuple[list[int], int]]]:
    """Ids of main, and of every branch with the index of its first target."""

    def ids(piece: Piece, first: bool) -> list[int]:
        found = next(encoded) if isinstance(piece, str) else piece
        return opened_by(found, bos) if first and isinstance(piece, str) else found

    main = ids(record.main, first=bool(record.main))
    branches = []
    for branch in record.branches:
        body = ids(branch.body, first=not main)
        if branch.completion is not None:
            branches.append((body + ids(branch.completion, first=False) + end, len(body)))
        else:
            branches.append((body + end if isinstance(branch.body, str) else body, branch.answer_offset))
    return main, branches


def _fitted(main: list[int], branches: list[tuple[list[int], int]], config: DataConfig) -> Tokenised:
    """What is left within the limits. The first token of a branch is never a target: nothing precedes it."""
    limit = config.max_branch_tokens
    main_cut = len(main) > limit
    if main_cut and config.overlong == "skip":
        return Tokenised(None, 0, len(branches))
    main = main[:limit]
    kept, offsets, truncated = [], [], int(main_cut)
    for ids, offset in branches:
        cut = len(ids) > limit
        if cut and config.overlong == "skip":
            continue
        ids = ids[:limit]
        if len(ids) <= max(offset, 1) or len(main) + len(ids) > config.max_sample_tokens:
            continue
        kept.append(ids)
        offsets.append(offset)
        truncated += cut
    tokens = Tokens.of(main, kept, offsets) if kept else None
    return Tokenised(tokens, truncated, len(branches) - len(kept))
