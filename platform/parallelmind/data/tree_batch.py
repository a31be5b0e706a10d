"""Records as batches for other training loops: of PyTorch, of Hugging Face's Trainer, of TRL.

Hugging Face models compare the logits of a token with the label one place to its right. In a tree, that place
may hold a token of another segment. So each label is stored one place to the right of the token that predicts
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from parallelmind.config import RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.data.record_parser import parse_value
from parallelmind.data.records import Record, RecordError
from parallelmind.data.tokenise import NO_LIMITS, TokenisedRecord, tokenise
from parallelmind.errors import UserError
from parallelmind.layout import IGNORE, Tokens
from parallelmind.model.tree_inputs import BatchSettings


def tree_batch(
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[Mapping[str, Any]],
    config: RopeConfig,
    packing: bool = False,
) -> BatchEncoding:
    """What a patched model is called with, `model(**batch)`, to get the mean loss over the target tokens.

    samples: records, as parallel JSONL holds them; each is one row of the batch, and nothing is cut off or
    left out. config: the settings of the model, `pm.rope_config(model)`. packing: lay the samples side by
    side in one row, without padding.

    Returns int64 tensors `[rows, tokens]`: input_ids, position_ids, labels (-100: no target), segment (-1:
    padding), and pos2d `[rows, tokens, 2]`; relations, int8 `[rows, segments + 1, segments + 1]`; and
    past_key_values, an object that models which are not patched refuse. Raises UserError for arguments of a
    wrong type, and with the index of the sample for a record that is bad, or has a text without a target that
    no target reads.
    """
    if not isinstance(config, RopeConfig):
        raise UserError(f"config: is {type(config).__name__}, not RopeConfig; pass pm.rope_config(model)")
    batch = make_batch(_tokenise(tokenizer, samples), config, tokenizer.pad_token_id or 0, packing=packing)
    assert (batch.labels[:, -1] == IGNORE).all(), "the last token of a row predicts nothing"
    arrays = {
        "input_ids": batch.ids,
        "position_ids": batch.position,
        "labels": np.roll(batch.labels, 1, axis=1),
        "pos2d": batch.pos2d,
        "segment": batch.segment,
        "relations": batch.relations,
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return BatchEncoding({**tensors, "past_key_values": BatchSettings(config)})


def _tokenise(tokenizer: PreTrainedTokenizerBase, samples: Iterable[Mapping[str, Any]]) -> list[Tokens]:
    samples = [] if isinstance(samples, str | Mapping) or not isinstance(samples, Iterable) else list(samples)
    if not samples:
        raise UserError("samples: holds no list of records; give a list of at least one")
    records = [_parse(sample, index, len(tokenizer)) for index, sample in enumerate(samples)]
    tokenised = tokenise(records, tokenizer, NO_LIMITS)
    return [
        _complete(record, result, index)
        for index, (record, result) in enumerate(zip(records, tokenised, strict=True))
    ]


def _parse(sample: Mapping[str, Any], index: int, vocab_size: int) -> Record:
    value = dict(sample) if isinstance(sample, Mapping) else sample
    if value == {}:
        raise UserError(f"samples[{index}]: is empty; with a Trainer, set remove_unused_columns=False")
    try:
        return parse_value(value, vocab_size)
    except RecordError as error:
        raise UserError(f"samples[{index}]: {error}") from error


def _complete(record: Record, tokenised: TokenisedRecord, index: int) -> Tokens:
    """The tokens of a record of which nothing was skipped."""
    if tokenised.tokens is None or tokenised.skipped:
        raise UserError(
            f"samples[{index}]: {tokenised.skipped} of {record.tree.segments - 1} texts have no target, nor "
            "has a text that reads them; give them a completion, or targets within their tokens"
        )
    return tokenised.tokens
