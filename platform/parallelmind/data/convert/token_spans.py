"""Character spans of the tokens of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallelmind.errors import UserError

if TYPE_CHECKING:  # a model library takes seconds to import
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenSpans:
    """Tokens of a text, without those that a tokenizer adds around an input.

    ids, starts, ends: `[tokens]` token ids and offsets in characters.
    A tokenizer may exclude white space at a token's edge from its span, and gives all tokens of one character
    the same span.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def __len__(self) -> int:
        return len(self.starts)


def token_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenSpans:
    """The spans of the tokens that `encode_texts` gives. Raises UserError if the tokenizer has no spans."""
    if not tokenizer.is_fast:
        raise UserError(
            f"base_model={tokenizer.name_or_path}: its tokenizer does not report character offsets; "
            "give a model that has a tokenizer.json"
        )
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    offsets = encoding.offset_mapping
    return TokenSpans(encoding.input_ids, [start for start, _ in offsets], [end for _, end in offsets])
