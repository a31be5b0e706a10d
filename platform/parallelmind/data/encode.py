"""Text to token ids, the same for training and decoding."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, first: bool) -> list[int]:
    """Token ids of `text`, without the special tokens that a tokenizer puts around a whole input.

    first: `text` opens the sample (main, or every branch where there is no main), so it gets the BOS that this
    tokenizer would add, unless the text (a chat template's, say) begins with it already.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos = opening(tokenizer) if first else []
    return ids if ids[: len(bos)] == bos else bos + ids


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that this tokenizer puts in front of an input, as a list of no or one id."""
    around: list[int] = tokenizer("").input_ids
    return around[:1] if around and around[0] == tokenizer.bos_token_id else []
