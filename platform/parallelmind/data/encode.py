"""Text to token ids, the same for training and decoding."""

from __future__ import annotations

import json
from itertools import takewhile
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tokenizers import Encoding, Tokenizer

if TYPE_CHECKING:  # importing transformers takes seconds, and reader processes may not need it
    from transformers import PreTrainedTokenizerBase

# What a chat template may raise for a conversation: its own errors, and those of the code in it.
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

_Part = dict[str, Any] | None  # a normalizer or pre-tokenizer as JSON

_without_prefix: WeakKeyDictionary[PreTrainedTokenizerBase, Tokenizer | None] = WeakKeyDictionary()


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, first: bool) -> list[int]:
    """Token ids of `text`, without the special tokens that a tokenizer adds around a whole input.

    first: `text` starts the sample (it is main, or a branch of a sample without main). It then begins with
    the BOS of this tokenizer, which is not added twice if the text (of a chat template, for example) already
    has it. Any other text continues the one before it.
    """
    if not first:
        return encode_continuations(tokenizer, [text])[0]
    return prepend_bos(encode_texts(tokenizer, [text])[0], bos_ids(tokenizer))


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of many texts in one call, each as the start of an input, without special tokens."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids
    return ids


def encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of many texts in one call, each as it is tokenised after another text.

    Tokenizers of the SentencePiece family put a space before an input, which must not stand inside a sample.
    """
    if tokenizer not in _without_prefix:
        _without_prefix[tokenizer] = _copy_without_prefix(tokenizer)
    backend = _without_prefix[tokenizer]
    if backend is None or not texts:
        return encode_texts(tokenizer, texts)
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    return [_continuation(tokenizer, text, encoding) for text, encoding in zip(texts, encodings, strict=True)]


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str, encoding: Encoding) -> list[int]:
    """The ids of a text that was encoded without a prefix, which counts up to its first added token."""
    ids: list[int] = encoding.ids
    added = tokenizer.added_tokens_decoder
    index = next((index for index, token in enumerate(ids) if token in added), None)
    if index is None:
        return ids
    start = encoding.offsets[index][0]
    return ids[:index] + encode_texts(tokenizer, [text[start:]])[0]


def _copy_without_prefix(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """A copy of the backend that puts nothing before an input, or None if the backend itself puts nothing."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python
        return None
    content = json.loads(backend.to_str())
    normalizer = _without_prepend(content["normalizer"])
    pre_tokenizer = _without_prepend(content["pre_tokenizer"])
    if (normalizer, pre_tokenizer) == (content["normalizer"], content["pre_tokenizer"]):
        return None
    changes = {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "truncation": None,
        "padding": None,
    }
    return Tokenizer.from_str(json.dumps({**content, **changes}))


def _without_prepend(part: _Part) -> _Part:
    """A normalizer or pre-tokenizer that does not put a space before its input."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    if part["type"] != "Sequence":
        return part
    key = "normalizers" if "normalizers" in part else "pretokenizers"
    if any(member["type"] == "WhitespaceSplit" for member in part[key]):
        return part  # it removes the spaces between words, and the prefix puts them back
    members = map(_without_prepend, part[key])
    return {**part, key: [member for member in members if member is not None]}


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token that the chat template writes after an answer, or None if it writes none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    exchange = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}]
    try:
        text = str(tokenizer.apply_chat_template(exchange, tokenize=False))
    except TEMPLATE_ERRORS:  # a template that takes other conversations only
        return None
    added = tokenizer.added_tokens_decoder
    (ids,) = encode_texts(tokenizer, [text])
    visible = [token for token in ids if str(tokenizer.decode([token])).strip()]
    after_answer = list(takewhile(added.__contains__, reversed(visible)))
    return after_answer[-1] if after_answer else None


def prepend_bos(ids: list[int], bos: list[int]) -> list[int]:
    """`bos` + `ids`, or `ids` alone if they already start with `bos`."""
    return ids if ids[: len(bos)] == bos else bos + ids


def append_eos(ids: list[int], eos: list[int]) -> list[int]:
    """`ids` + `eos`, or `ids` alone if they already end with `eos`."""
    return ids if eos == ids[-1:] else ids + eos


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The EOS of this tokenizer: a list of one id, or an empty list."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that this tokenizer adds to an input: a list of one id, or an empty list."""
    special: list[int] = tokenizer("").input_ids
    return special[:1] if special and special[0] == tokenizer.bos_token_id else []
