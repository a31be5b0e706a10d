"""Compile grammars for a vocabulary, and compute the masks of a batch. No torch."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from transformers import PreTrainedTokenizerBase

from parallelmind.engine.grammar import Grammar
from parallelmind.engine.grammar_matcher import GrammarMatcher, TokenMasks
from parallelmind.errors import UserError, first_line

_MAX_CACHED = 128
# Without a bound a model may write white space until its tokens are used up.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\t]{1,20}"}
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps those that were used last."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = Lock()
        self._executor = ThreadPoolExecutor(1, "grammar-masks")

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Compile a grammar, which takes up to a second. Raises UserError for one that cannot be used."""
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        matcher = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        return matcher

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the beginning of a grammar."""
        return GrammarMatcher(self.compile(grammar).deep_copy())

    def begin_masks(self, matchers: Sequence[GrammarMatcher | None]) -> Future[TokenMasks] | None:
        """Compute the masks of the rows that have a matcher, in another thread; None if no row has one."""
        rows = [index for index, matcher in enumerate(matchers) if matcher is not None]
        if not rows:
            return None
        present = [matcher for matcher in matchers if matcher is not None]
        return self._executor.submit(self._masks, rows, present)

    def _masks(self, rows: list[int], matchers: list[GrammarMatcher]) -> TokenMasks:
        bits = np.zeros((len(rows), self._num_bytes), np.uint8)
        for row, matcher in zip(bits, matchers, strict=True):
            matcher.fill_mask(row)
        return TokenMasks(np.array(rows), bits)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            matcher = LLMatcher(
                self._vocabulary, _source(grammar), log_level=0, limits=LLParserLimits(**_LIMITS)
            )
        except ValueError as error:
            raise grammar.error(first_line(error)) from error
        reason = matcher.get_error() or self._first_mask_error(matcher.deep_copy())
        if reason:
            raise grammar.error(f"{' '.join(reason.split())[:200]}; give another grammar")
        return matcher

    def _first_mask_error(self, matcher: LLMatcher) -> str:
        """Why no text follows the grammar; empty if one does."""
        probe = GrammarMatcher(matcher)
        probe.fill_mask(np.zeros(self._num_bytes, np.uint8))
        return probe.error or ""

    @property
    def _num_bytes(self) -> int:
        """Of a mask, in words of 32 bits."""
        return 4 * -(-self._vocabulary.vocab_size // 32)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        """Raises UserError for a tokenizer whose tokens are not known as bytes."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        try:
            if backend is None:
                raise ValueError("it is not a fast tokenizer")
            state = _without_padding(backend)
            size = max(self._vocab_size, backend.get_vocab_size())
            return LLTokenizer(state, n_vocab=size, eos_token=self._eos_token_ids)
        except ValueError as error:
            raise UserError(
                f"grammar: the model's tokenizer cannot be constrained ({first_line(error)}); "
                "leave grammar out"
            ) from error


def _source(grammar: Grammar) -> str:
    """A grammar in the form that llguidance compiles."""
    if grammar.kind == "json":
        return LLMatcher.grammar_from_json_schema(grammar.text, defaults=_JSON_OPTIONS)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        options = " | ".join(json.dumps(option) for option in json.loads(grammar.text))
        return LLMatcher.grammar_from_lark(f"start: {options}")
    return LLMatcher.grammar_from_lark(grammar.text)


def _without_padding(backend: Any) -> str:
    """A tokenizer of the tokenizers library as JSON."""
    copy = type(backend).from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return str(copy.to_str())
