"""Split plain text into standalone records of limited length. Joined, the records give the text again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from parallelmind.data.convert.source_records import BadRecord, ParallelRecord
from parallelmind.data.convert.token_spans import TokenSpans, token_spans
from parallelmind.data.encode import bos_ids, encode_texts

if TYPE_CHECKING:  # a model library takes seconds to import
    from transformers import PreTrainedTokenizerBase

_MIN_BLOCK = 1 << 16  # characters tokenised together


def chunk_text(
    pieces: Iterable[str | BadRecord], tokenizer: PreTrainedTokenizerBase, chunk_tokens: int
) -> Iterator[ParallelRecord | BadRecord]:
    """{"text"} records of at most `chunk_tokens` tokens as training counts them, BOS and EOS included.

    pieces: the text, in order. One block of the text is in memory at a time. Blank chunks are skipped.
    """
    max_tokens = chunk_tokens - len(bos_ids(tokenizer)) - (tokenizer.eos_token_id is not None)
    block_characters = max(_MIN_BLOCK, 16 * chunk_tokens)
    block = ""
    for piece in pieces:
        if isinstance(piece, BadRecord):
            yield piece
            continue
        block += piece
        if len(block) >= block_characters:
            *full_chunks, block = split_text(block, tokenizer, max_tokens)
            yield from _text_records(full_chunks)
    yield from _text_records(split_text(block, tokenizer, max_tokens))


def _text_records(texts: list[str]) -> Iterator[ParallelRecord]:
    return ({"text": text} for text in texts if text.strip())


def split_text(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[str]:
    """Split the text into one or more chunks, each of at most `max_tokens` tokens when tokenised alone."""
    spans = token_spans(tokenizer, text)
    chunks, token, start = [], 0, 0
    while token < len(spans):
        for stop in _stop_tokens(text, spans, token, max_tokens):
            end = spans.ends[stop - 1] if stop < len(spans) else len(text)
            # Without its neighbours, a text may have more tokens.
            if len(encode_texts(tokenizer, [text[start:end]])[0]) <= max_tokens:
                break
        chunks.append(text[start:end])
        token, start = stop, end
    return chunks or [text]


def _stop_tokens(text: str, spans: TokenSpans, token: int, max_tokens: int) -> Iterator[int]:
    """Tokens before which a chunk from `token` on may end, the best first.

    These are the end of the text, late tokens at white space, then any token that begins a character.
    """
    last = min(token + max_tokens, len(spans))
    boundaries = [
        stop
        for stop in range(last, token, -1)
        if stop == len(spans) or spans.ends[stop - 1] <= spans.starts[stop]
    ]
    if last == len(spans):
        yield last
    for stop in boundaries[: len(boundaries) // 2]:
        end = spans.ends[stop - 1]
        if text[end - 1].isspace() or text[end : end + 1].isspace():
            yield stop
    yield from boundaries or [last]
