"""One small tokenizer of each kind, which differ in how they tokenise the space before a word."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_CORPUS = [
    "The answer to the question is in the passage. For lunch Ada likes rice, and Bob likes red beans. "
    "What does Ada eat? Who lives here? rice rice beans"
] * 3
_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _sentencepiece_decoder() -> Any:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _byte_level(add_prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, _bpe(pre_tokenizers.ByteLevel.alphabet()))


def _split_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, _bpe(pre_tokenizers.ByteLevel.alphabet()))


def _prepend() -> Tokenizer:
    """▁ before every input and for every space, by normalizers; no pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _sentencepiece_decoder()
    trained = Tokenizer.from_str(tokenizer.to_str())
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # words alone, as SentencePiece
    trained.train_from_iterator(_CORPUS, _bpe([], _BYTES))
    tokenizer.model = trained.model
    return tokenizer


def _metaspace(prepend_scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=prepend_scheme, split=False
    )
    tokenizer.decoder = _sentencepiece_decoder()
    words = Tokenizer.from_str(tokenizer.to_str())
    words.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend_scheme, split=True)
    words.train_from_iterator(_CORPUS, _bpe([], _BYTES))
    tokenizer.model = words.model
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return _train(tokenizer, _unigram_trainer())


def _words_without_spaces() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    return _train(tokenizer, _unigram_trainer())


def _replace() -> Tokenizer:
    """▁ for every space and nothing before an input."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trained = _train(Tokenizer.from_str(tokenizer.to_str()), _bpe([], _BYTES))
    tokenizer.model = trained.model  # without the bytes as added tokens
    return tokenizer


def _unigram_trainer() -> trainers.UnigramTrainer:
    return trainers.UnigramTrainer(
        vocab_size=120,
        initial_alphabet=list("▁\nù😀é:?.B"),
        special_tokens=_SPECIAL,
        unk_token="<unk>",
        show_progress=False,
    )


def _bpe(alphabet: list[str], more_tokens: list[str] | None = None) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=300 + len(more_tokens or []) + len(alphabet),
        initial_alphabet=alphabet,
        special_tokens=[*_SPECIAL, *(more_tokens or [])],
        show_progress=False,
    )


KINDS = {
    "byte level": lambda: _byte_level(add_prefix_space=False),
    "byte level with a space before": lambda: _byte_level(add_prefix_space=True),
    "byte level after a split": _split_byte_level,
    "prepend": _prepend,
    "metaspace always": lambda: _metaspace("always"),
    "metaspace first": lambda: _metaspace("first"),
    "metaspace never": lambda: _metaspace("never"),
    "unigram": _unigram,
    "words without spaces": _words_without_spaces,
    "replace": _replace,
}


@cache
def _backend(kind: str) -> str:
    backend = KINDS[kind]()
    backend.add_special_tokens(_SPECIAL)
    return backend.to_str()


def tokenizer_of_kind(kind: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A new tokenizer of about 300 tokens, and of 256 bytes where its kind falls back to them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
