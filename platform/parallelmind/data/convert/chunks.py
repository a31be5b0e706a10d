"""Plain text of any length as lone records of so many tokens; joined, they are the text again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from parallelmind.data.convert.items import Bad, Converted
from parallelmind.data.convert.spans import Spans, spans
from parallelmind.data.encode import bos_ids, encode_text

_BLOCK = 1 << 16  # characters tokenised together


def chunks(
    pieces: Iterable[str | Bad], tokenizer: PreTrainedTokenizerBase, chunk_tokens: int
) -> Iterator[Converted | Bad]:
    """{"text"} records of the pieces' text, none over `chunk_tokens` as training counts it, BOS and EOS
    included.

    Only a block of the text is held. A chunk of white space alone is left out.
    """
    room = chunk_tokens - len(bos_ids(tokenizer)) - (tokenizer.eos_token_id is not None)
    block = max(_BLOCK, 16 * chunk_tokens)
    held = ""
    for piece in pieces:
        if isinstance(piece, Bad):
            yield piece
            continue
        held += piece
        if len(held) >= block:
            *full, held = cut(held, tokenizer, room)
            yield from _records(full)
    yield from _records(cut(held, tokenizer, room))


def _records(texts: list[str]) -> Iterator[Converted]:
    return ({"text": text} for text in texts if text.strip())


def cut(text: str, tokenizer: PreTrainedTokenizerBase, room: int) -> list[str]:
    """The text in at least one part, each of at most `room` tokens when it is tokenised alone."""
    found = spans(tokenizer, text)
    parts, token, place = [], 0, 0
    while token < len(found):
        for stop in _stops(text, found, token, room):
            end = found.ends[stop - 1] if stop < len(found) else len(text)
            # Tokens can be more once their neighbours are gone.
            if len(encode_text(tokenizer, text[place:end], first=False)) <= room:
                break
        parts.append(text[place:end])
        token, place = stop, end
    return parts or [text]


def _stops(text: str, found: Spans, token: int, room: int) -> Iterator[int]:
    """Tokens before which a part from `token` on may end, best first: the end, late ones at a space, any
    between characters.
    """
    last = min(token + room, len(found))
    places = [
        stop
        for stop in range(last, token, -1)
        if stop == len(found) or found.ends[stop - 1] <= found.starts[stop]
    ]
    if last == len(found):
        yield last
    for stop in places[: len(places) // 2]:
        end = found.ends[stop - 1]
        if text[end - 1].isspace() or text[end : end + 1].isspace():
            yield stop
    yield from places or [last]
