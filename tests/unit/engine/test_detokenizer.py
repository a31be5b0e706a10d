"""Streamed text of any ids: no error, nothing lost, and the text of the whole wherever that is fixed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from parallelmind.engine.detokenizer import Detokenizer

_LETTERS = "▁abcdefghijklmnopqrstuvwxyzé\ufffd"


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the decoder of Llama 2, Mistral and Gemma, and a token for every byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_LETTERS, "▁the", "▁▁"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def in_python(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The same tokenizer as one that is written in Python."""
    return SimpleNamespace(decode=tokenizer.decode)


BYTE_FALLBACK, BYTE_LEVEL = byte_fallback_tokenizer(), tiny_tokenizer()
KINDS = {
    "byte fallback": BYTE_FALLBACK,
    "byte level": BYTE_LEVEL,
    "byte fallback in Python": in_python(BYTE_FALLBACK),
}
CHARACTERS = ["\n", "é", "€", "🦙", "👍", "x", " the", " ", "\ufffd"]
TEXT = st.lists(st.sampled_from(CHARACTERS), max_size=12).map("".join)
IDS = st.lists(st.integers(0, 289), max_size=24)


def pieces(tokenizer: Any, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def byte_ids(text: bytes) -> list[int]:
    return BYTE_FALLBACK.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text])


_BYTE_LETTERS = bytes_to_unicode()
X, THE = BYTE_FALLBACK.convert_tokens_to_ids(["x", "▁the"])


@pytest.mark.parametrize("kind", ["byte fallback", "byte fallback in Python"])
@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([*byte_ids(b"\n\xf0\x9f"), THE], ["\n", "", "", "\ufffd\ufffd the", ""]),
        ([*byte_ids("🦙".encode() + b"\xf0"), THE], ["", "", "", "🦙", "", "\ufffd the", ""]),
        ([*byte_ids(b"\n\n\xe2"), X, X], ["\n", "\n", "", "\ufffdx", "x", ""]),
        ([*byte_ids(b"\n\xe2\n"), X], ["\n", "", "", "\ufffd\ufffdx", ""]),
        (byte_ids(b"\n\xe2"), ["\n", "", "\ufffd"]),
        ([*byte_ids("\n🦙".encode()), X], ["\n", "", "", "", "🦙", "x", ""]),
    ],
)
def test_a_character_that_stays_incomplete_takes_nothing_back(kind, ids, expected) -> None:
    assert pieces(KINDS[kind], [], ids) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=IDS, ids=IDS)
def test_no_ids_raise(kind, prompt, ids) -> None:
    pieces(KINDS[kind], prompt, ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, ids=st.lists(st.integers(259, 289), max_size=8))
def test_pieces_of_valid_text_add_up_to_the_decoded_whole(kind, text, ids) -> None:
    """ids: tokens of byte fallback that are no bytes."""
    fast = BYTE_LEVEL if kind == "byte level" else BYTE_FALLBACK
    whole = [*fast(text).input_ids, *ids]
    assert "".join(pieces(KINDS[kind], [], whole)) == fast.decode(whole, skip_special_tokens=True)


@given(prompt=IDS, ids=IDS)
def test_byte_level_pieces_add_up_to_the_decoded_whole(prompt, ids) -> None:
    before, after = (BYTE_LEVEL.decode(part, skip_special_tokens=True) for part in (prompt, prompt + ids))
    assert "".join(pieces(BYTE_LEVEL, [], ids)) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)
    if not before.endswith("\ufffd"):
        assert "".join(pieces(BYTE_LEVEL, prompt, ids)) == after[len(before) :]


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("byte fallback", byte_ids(b"\xf0")),
        ("byte fallback", byte_ids(b"\xe2\n")),
        ("byte fallback", byte_ids("\ufffd".encode())),
        ("byte fallback", [2]),  # skipped, as every special token
        ("byte fallback", [10**6]),  # of an embedding with more rows than the tokenizer has ids
        ("byte level", BYTE_LEVEL("🦙", add_special_tokens=False).input_ids[:1]),
        ("byte level", [10**6]),
    ],
)
def test_ids_that_never_become_text_are_decoded_a_bounded_number_of_times(kind, ids) -> None:
    lengths = []

    def decode(ids: list[int], **settings: bool) -> str:
        lengths.append(len(ids))
        return str(KINDS[kind].decode(ids, **settings))

    text = "".join(pieces(SimpleNamespace(decode=decode), [], ids * 200))
    assert text == KINDS[kind].decode(ids * 200, skip_special_tokens=True)
    assert max(lengths) < 32


@given(ids=st.lists(st.sampled_from([*byte_ids(b"\xf0\x9f\xa6\x99\xe2\x82\xac"), 2]), max_size=80))
def test_long_runs_of_bytes_end_with_the_characters_that_follow_them(ids) -> None:
    assert "".join(pieces(BYTE_FALLBACK, [], [*ids, X, *byte_ids("🦙".encode())])).endswith("x🦙")


@given(text=st.lists(st.sampled_from([b"\xf0", b"\x9f", b"\xa6", b"\xe2", b"\x82", b"\xac"]), max_size=80))
def test_long_runs_of_byte_level_ids_add_up_to_the_decoded_whole(text) -> None:
    ids = [BYTE_LEVEL.convert_tokens_to_ids(_BYTE_LETTERS[byte[0]]) for byte in text]
    assert "".join(pieces(BYTE_LEVEL, [], ids)) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


def test_a_prompt_whose_context_begins_inside_a_character_keeps_the_space_of_the_first_word() -> None:
    prompt = [
        X,
        *byte_ids("🦙🦙\n".encode()),
    ]  # the last eight tokens begin with the second byte of an animal
    assert pieces(BYTE_FALLBACK, prompt, [THE]) == [" the", ""]
