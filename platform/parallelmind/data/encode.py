"""Text to token ids, the same for training and decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing transformers takes seconds, and reader processes may not need it
    from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, first: bool) -> list[int]:
    """Token ids of `text`, without the special tokens that a tokenizer adds around a whole input.

    first: `text` starts the sample (it is main, or a branch of a sample without main). It then begins with
    the BOS of this tokenizer, which is not added twice if the text (of a chat template, for example) already
    has it.
    """
    (ids,) = encode_texts(tokenizer, [text])
    return prepend_bos(ids, bos_ids(tokenizer)) if first else ids


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of many texts in one call, without special tokens."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids
    return ids


def prepend_bos(ids: list[int], bos: list[int]) -> list[int]:
    """`bos` + `ids`, or `ids` alone if they already start with `bos`."""
    return ids if ids[: len(bos)] == bos else bos + ids


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that this tokenizer adds to an input: a list of one id, or an empty list."""
    special: list[int] = tokenizer("").input_ids
    return special[:1] if special and special[0] == tokenizer.bos_token_id else []
