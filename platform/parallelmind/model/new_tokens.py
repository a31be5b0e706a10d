"""Tokens that training adds to a tokenizer, and their rows in the embeddings of the model."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.errors import UserError, format_value

_IDS = "_new_token_ids"


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Add the tokens at the end of the vocabulary. Raises UserError for one that is there or is no text."""
    known = tokenizer.get_vocab()
    for position, token in enumerate(tokens):
        if not token.strip():
            problem = "is no text"
        elif token in known or token in tokens[:position]:
            problem = "is a token of the tokenizer already"
        else:
            continue
        raise UserError(f"add_tokens={format_value(token)}: {problem}; leave it out")
    tokenizer.add_tokens(tokens)


@torch.no_grad()
def extend_model(model: PreTrainedModel, vocab_size: int, count: int) -> None:
    """Give the last `count` of `vocab_size` token ids rows in the embeddings: the mean of all other rows.

    Tied embeddings stay tied.
    """
    first = vocab_size - count
    rows = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    if vocab_size > rows:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for name in _embedding_names(model):
        weight = cast(torch.Tensor, model.get_submodule(name).weight)
        weight[first:vocab_size] = weight[: min(first, rows)].float().mean(0).to(weight.dtype)
    setattr(model, _IDS, list(range(first, vocab_size)))


def new_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens whose rows `extend_model` has added."""
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in getattr(model, _IDS, [])]


def trainable_token_indices(model: PreTrainedModel) -> dict[str, list[int]] | None:
    """peft's setting that trains the rows of `extend_model`, None for a model without new rows."""
    ids: list[int] = getattr(model, _IDS, [])
    return dict.fromkeys(_embedding_names(model), ids) if ids else None


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """The input embedding and, unless it has the same weight, the output embedding."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    if modules[1] is None or modules[1].weight is modules[0].weight:
        modules = modules[:1]
    return [name for name, module in model.named_modules() if any(module is wanted for wanted in modules)]
