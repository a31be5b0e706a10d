"""Text to token ids, the same for training and decoding."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, first: bool) -> list[int]:
    """Token ids of `text`, without the special tokens that a tokenizer puts around a whole input.

    first: `text` opens the sample (main, or every branch where there is no main), so it gets the BOS that
    this tokenizer would add, unless the text (a chat template's, say) begins with it already.
    """
    (ids,) = encode_texts(tokenizer, [text])
    return opened_by(ids, opening(tokenizer)) if first else ids


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of many texts in one call, without special tokens around them."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids
    return ids


def opened_by(ids: list[int], bos: list[int]) -> list[int]:
    """`ids` with BOS in front, once."""
    return ids if ids[: len(bos)] == bos else bos + ids


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that this tokenizer puts in front of an input, as a list of no or one id."""
    around: list[int] = tokenizer("").input_ids
    return around[:1] if around and around[0] == tokenizer.bos_token_id else []
