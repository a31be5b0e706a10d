"""Decoded tokens to text as they come. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import decoders

_INCOMPLETE = "\ufffd"  # what a tokenizer decodes an incomplete character to
_MAX_PENDING = 8  # ids; a character has at most four bytes
_NUM_CONTEXT = 8  # prompt tokens that decide whether the first word begins with a space


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that turns ids into text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str | list[str]: ...


class TokenDecoder:
    """Decodes ids with a tokenizer.

    joins_bytes: whether the text of ids is made of the bytes of each, side by side.
    whole_texts: the text of each token that has the same text everywhere, as whole characters of a tokenizer
        that joins bytes do; None for any other.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A fast tokenizer's own decode is the quickest; one that is written in Python has none.
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._decode_ids: Callable[..., Any] = (tokenizer if backend is None else backend).decode
        self.joins_bytes = isinstance(getattr(backend, "decoder", None), decoders.ByteLevel)
        self.whole_texts = _WholeTexts(self)

    def decode(self, ids: list[int]) -> str:
        return str(self._decode_ids(ids, skip_special_tokens=True)) if ids else ""


class _WholeTexts(dict[int, str | None]):
    """Decodes a token when it is first asked for."""

    def __init__(self, decoder: TokenDecoder) -> None:
        super().__init__()
        self._decoder = decoder

    def __missing__(self, token: int) -> str | None:
        text = self._decoder.decode([token]) if self._decoder.joins_bytes else _INCOMPLETE
        self[token] = None if _INCOMPLETE in text else text
        return self[token]


class Detokenizer:
    """Decodes a growing list of ids; a character that is split over tokens waits until it is complete.

    New text is what the pending ids add to their context, the ids of the text before them. A byte-fallback
    decoder may decode the context differently once invalid bytes follow it. Returned text stays as it is,
    and the pending ids are decoded without context then. The number of pending ids is bounded, because a
    model may decode ids that never become text.
    """

    __slots__ = ("_context", "_context_text", "_decode", "_pending", "_whole_texts")

    def __init__(self, tokenizer: Tokenizer | TokenDecoder, prompt: Sequence[int]) -> None:
        """tokenizer: a `TokenDecoder` may serve many branches."""
        decoder = tokenizer if isinstance(tokenizer, TokenDecoder) else TokenDecoder(tokenizer)
        self._decode, self._whole_texts = decoder.decode, decoder.whole_texts
        self._pending: list[int] = []
        length = 0 if decoder.joins_bytes else min(_NUM_CONTEXT, len(prompt))
        ends = [list(prompt[-length:]) for length in range(length, 0, -1)]
        # With an incomplete character in it, the context would return that character again.
        self._set_context(next((ids for ids in ends if not self._decode(ids).endswith(_INCOMPLETE)), []))

    def push(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        if not self._pending and (whole := self._whole_texts[token]) is not None:
            return whole
        self._pending.append(token)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return self._oldest_text(text) if len(self._pending) > _MAX_PENDING else ""
        self._set_context(self._pending)
        self._pending = []
        return text

    def flush(self) -> str:
        """The text that is still incomplete, with the replacement character for incomplete bytes."""
        text, self._pending = self._new_text() if self._pending else "", []
        return text

    def _oldest_text(self, text: str) -> str:
        """The part of the pending `text` that no further id changes, without the last ids.

        Three ids may be the first bytes of a character.
        """
        pending = self._pending
        for num_kept in (3, 2, 1):
            self._pending = pending[:-num_kept]
            oldest = self._new_text()
            if text.startswith(oldest):
                if oldest:
                    self._set_context(self._pending)
                self._pending = pending[-num_kept:]
                return oldest
        self._pending = pending
        return ""

    def _new_text(self) -> str:
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(self._pending)

    def _set_context(self, ids: list[int]) -> None:
        self._context, self._context_text = ids, self._decode(ids)
