"""Where in a text each of its tokens stands."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from parallelmind.errors import UserError


@dataclass(frozen=True, slots=True)
class Spans:
    """starts, ends: `[tokens]` characters of the text, without the special tokens around it.

    A tokenizer may leave white space at a token's edge out of its span, and gives the pieces of one character
    the same span.
    """

    starts: list[int]
    ends: list[int]

    def __len__(self) -> int:
        return len(self.starts)


def spans(tokenizer: PreTrainedTokenizerBase, text: str) -> Spans:
    """The spans of exactly the tokens that `encode_texts` gives. Raises UserError for a tokenizer that does
    not know them.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"base_model={tokenizer.name_or_path}: its tokenizer does not tell where tokens stand in a text; "
            "give a model that has a tokenizer.json"
        )
    found = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    ).offset_mapping
    return Spans([start for start, _ in found], [end for _, end in found])
