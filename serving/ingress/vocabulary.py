"""The text and the bytes of single tokens, for log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from parallelmind.engine.detokenizer import Detokenizer

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in a vocabulary of characters
_BYTE_OF_LETTER = {letter: byte for byte, letter in bytes_to_unicode().items()}  # in a byte-level vocabulary


class Vocabulary:
    """The tokens of a tokenizer, one by one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.token_text = cache(self._token_text)

    def _token_text(self, token: int) -> str:
        """The token's text; its name in the vocabulary if the token is not whole characters."""
        text = self._decode(token)
        return text if text and _REPLACEMENT not in text else self._name(token)

    def prompt_text(self, prompt: str | list[int]) -> str:
        """The text of a prompt, without special tokens if it is given as token ids."""
        return (
            prompt
            if isinstance(prompt, str)
            else str(self._tokenizer.decode(prompt, skip_special_tokens=True))
        )

    def text_offsets(self, tokens: Sequence[int]) -> list[int]:
        """Where the text of each token begins in that of all; special tokens have none."""
        detokenizer, length, offsets = Detokenizer(self._tokenizer, []), 0, []
        for token in tokens:
            offsets.append(length)
            length += len(detokenizer.push(token))
        return offsets

    def token_bytes(self, token: int) -> bytes | None:
        """The token's bytes, which need not be whole characters; None if they are not known."""
        text = self._decode(token)
        if text and _REPLACEMENT not in text:
            return text.encode()
        name = self._name(token)
        byte = _BYTE_TOKEN.fullmatch(name)
        raw = bytes.fromhex(byte[1]) if byte else bytes(_BYTE_OF_LETTER.get(letter, 0) for letter in name)
        # Names of another kind of vocabulary do not decode to the token's text.
        return raw if raw.decode(errors="replace") == text else None

    def _decode(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _name(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token))
