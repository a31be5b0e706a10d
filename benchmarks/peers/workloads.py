"""The works that engines are compared on, as requests made from the passages of `benchmarks.text`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

from benchmarks.peers.protocol import Request
from benchmarks.text import passages

BATCH, MAIN_TOKENS, ADAPTERS = 16, 1024, 8
DOCUMENTS, DOCUMENT_TOKENS = 8, 244  # with a question they fit a context of 2,048 tokens


def batch(_turn: int = 0) -> list[Request]:
    """W1: 16 prompts, 64 new tokens each."""
    random = Random(1)
    return [Request([_cut(random, 16, 24) for _ in range(BATCH)], 64, [])]


def shared_main_cold(turn: int) -> list[Request]:
    """W2: 16 questions on 1,024 shared tokens, 32 new tokens each. Every turn has a main of its own."""
    ids, start = _tokens(), (turn + 1) * MAIN_TOKENS
    assert start + MAIN_TOKENS <= len(ids), f"turn {turn}: the passages have too few tokens"
    return [Request(_questions(), 32, ids[start : start + MAIN_TOKENS])]


def shared_main_warm(_turn: int = 0) -> list[Request]:
    """W2 with one main for all turns, so that all but the first find it in the cache."""
    return [Request(_questions(), 32, _tokens()[:MAIN_TOKENS])]


def new_documents(turn: int) -> list[Request]:
    """One question on eight documents that no turn before had, one new token."""
    ids, start = _tokens(), turn * DOCUMENTS * DOCUMENT_TOKENS
    starts = range(start, start + DOCUMENTS * DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    documents = [ids[first : first + DOCUMENT_TOKENS] for first in starts]
    assert len(documents[-1]) == DOCUMENT_TOKENS, f"turn {turn}: the passages have too few tokens"
    return [Request([_questions()[0]], 1, [], documents=documents)]


def reordered_documents(turn: int) -> list[Request]:
    """Another question on the same documents in another order, whose first document is another one."""
    (request,) = new_documents(turn)
    order = [*Random(turn).sample(range(1, DOCUMENTS), DOCUMENTS - 1), 0]
    documents = [request.documents[index] for index in order]
    return [replace(request, prompts=[_questions()[1]], documents=documents)]


def one_prompt(_turn: int = 0) -> list[Request]:
    """W3: one prompt, 128 new tokens."""
    return [Request([_cut(Random(3), 20, 20)], 128, [])]


def arrivals(_turn: int = 0) -> list[Request]:
    """W4: 32 requests of 8 to 128 new tokens, which arrive within 1.5 seconds."""
    random = Random(4)
    times = sorted(random.uniform(0, 1.5) for _ in range(32))
    return [Request([_cut(random, 8, 24)], random.randint(8, 128), [], at) for at in times]


def one_adapter(_turn: int = 0) -> list[Request]:
    """The prompts of W1 as eight samples of two, 32 new tokens each, all with the same adapter."""
    (request,) = batch()
    pairs = [request.prompts[start : start + 2] for start in range(0, BATCH, 2)]
    return [replace(request, prompts=prompts, new_tokens=32, adapter="0") for prompts in pairs]


def eight_adapters(_turn: int = 0) -> list[Request]:
    """The same samples, each with an adapter of its own."""
    return [replace(request, adapter=str(number)) for number, request in enumerate(one_adapter())]


def _cut(random: Random, shortest: int, longest: int) -> list[int]:
    """A run of tokens from a random place of the passages."""
    length = random.randint(shortest, longest)
    start = random.randrange(len(_tokens()) - length)
    return _tokens()[start : start + length]


def _questions() -> list[list[int]]:
    return [question for _, questions in passages(BATCH // 8) for question in questions]


@cache
def _tokens() -> list[int]:
    return [token for main, _ in passages(240) for token in main]
