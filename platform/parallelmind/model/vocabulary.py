"""Check a tokenizer against the embedding of its model."""

from __future__ import annotations

import functools

from transformers import PreTrainedTokenizerBase

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError
from parallelmind.model.base_model import load_base_config


@functools.cache
def embedding_rows(model: ModelConfig) -> int:
    """Number of token ids that the model can read."""
    return int(load_base_config(model).get_text_config(decoder=True).vocab_size)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> list[str]:
    """What the user should know about the tokenizer before training, one line each.

    Raises UserError if a token that training itself writes (begin, end, padding) has no row in the embedding.
    """
    rows = embedding_rows(model)
    for name in ("bos_token", "eos_token", "pad_token"):
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None and token_id >= rows:
            raise _no_row(model, tokenizer, token_id, rows, name)
    notes = []
    if surplus := sorted(token_id for token_id in tokenizer.get_vocab().values() if token_id >= rows):
        first = tokenizer.convert_ids_to_tokens(surplus[0])
        notes.append(
            f"base_model={model.base_model}: the embedding has {rows:,} rows, and none for {len(surplus):,} "
            f"tokens of the tokenizer (the first: {first!r}); a record that holds one cannot be trained on"
        )
    if tokenizer.eos_token_id is None:
        notes.append(
            f"base_model={model.base_model}: the tokenizer has no end token, so texts and completions are "
            "trained on without an end, and the model does not learn to stop; set eos_token in "
            "tokenizer_config.json"
        )
    return notes


def check_highest_id(
    highest: int, source: str, tokenizer: PreTrainedTokenizerBase, model: ModelConfig
) -> None:
    """Raise UserError if the highest token id in some data has no row in the embedding. source: the data."""
    if highest >= (rows := embedding_rows(model)):
        raise _no_row(model, tokenizer, highest, rows, f"a token of {source},")


def _no_row(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, token_id: int, rows: int, what: str
) -> UserError:
    """The error for a token without a row in the embedding. what: names the token before its text."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return UserError(
        f"base_model={model.base_model}: the embedding has {rows:,} rows, and none for {what} {token!r} "
        f"(id {token_id:,}); save a model with resize_token_embeddings(len(tokenizer)), or do not use it"
    )
