"""Records to `layout.Tokens`, within the length limits."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig
from parallelmind.data.encode import encode_text
from parallelmind.data.records import Branch, Piece, Record
from parallelmind.layout import Tokens


@dataclass(frozen=True, slots=True)
class Tokenised:
    """tokens: None where no branch is left. truncated: mains and branches that were cut. skipped: branches left out."""

    tokens: Tokens | None
    truncated: int
    skipped: int


def tokenise(record: Record, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Tokenised:
    """Token ids of a record.

    Prompt and completion are tokenised apart, so decoding the prompt gives exactly the training prefix. Text and
    completions end with the tokenizer's EOS, so that a model learns to stop; `input_ids` are taken as they are. A main
    or branch over `max_branch_tokens` is cut from the right or skipped; a branch without a target is skipped, and so is
    one that would not fit into `max_sample_tokens` beside its main.
    """
    limit = config.max_branch_tokens
    main = _encode(tokenizer, record.main, first=True) if record.main else []
    main_cut = len(main) > limit
    if main_cut and config.overlong == "skip":
        return Tokenised(None, 0, len(record.branches))
    main = main[:limit]
    kept, offsets, truncated = [], [], int(main_cut)
    for branch in record.branches:
        ids, offset = _encode_branch(tokenizer, branch, first=not main)
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
    return Tokenised(tokens, truncated, len(record.branches) - len(kept))


def _encode_branch(tokenizer: PreTrainedTokenizerBase, branch: Branch, first: bool) -> tuple[list[int], int]:
    """Ids and the index of the first target. The first token of a branch is never a target: nothing precedes it."""
    ids = _encode(tokenizer, branch.body, first)
    if not isinstance(branch.body, str):
        return ids, branch.answer_offset
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if branch.completion is None:
        return ids + end, branch.answer_offset
    return ids + _encode(tokenizer, branch.completion, first=False) + end, len(ids)


def _encode(tokenizer: PreTrainedTokenizerBase, piece: Piece, first: bool) -> list[int]:
    return encode_text(tokenizer, piece, first) if isinstance(piece, str) else piece
