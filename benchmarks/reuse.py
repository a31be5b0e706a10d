"""The cache of the engine: the share of repeated tokens that is found, and its use while samples wait.

Both are counts, which do not depend on the machine.
"""

from __future__ import annotations

import parallelmind as pm
from benchmarks.decoding import shared_main
from benchmarks.harness import Bench
from benchmarks.text import tokenizer

_PROMPTS, _COMMON, _OWN = 10, 100, 12
_TURNS, _QUESTION, _ANSWER = 5, 20, 30
_WAITING, _STEPS, _CACHE_TOKENS, _MAX_NEW_TOKENS = 200, 16, 4608, 4096


def _engine(cache_tokens: int = 1 << 14) -> pm.Engine:
    """An engine whose branches share keys: with rope_2d_ratio=0 they depend on the path alone."""
    model, _ = pm.load_model_with_lora(
        base_model="smollm2-135m", rope_2d_ratio=0, visibility="isolated", positions="time"
    )
    return pm.Engine(model, tokenizer(), pm.EngineConfig(cache_tokens))


def _run(engine: pm.Engine) -> list[int]:
    """Run to the end; returns all decoded tokens."""
    events = []
    while engine.busy:
        events += engine.step()
    return [event.token for event in events if event.token is not None]


def _prompts() -> list[list[int]]:
    text = shared_main()
    ends = (text[start : start + _OWN] for start in range(200, 200 + _PROMPTS * _OWN, _OWN))
    return [[*text[:_COMMON], *end] for end in ends]


def _reused_as_branches() -> tuple[int, int]:
    """Tokens that were found, and that could be found: all but the first prompt repeat the beginning."""
    engine = _engine()
    engine.submit(pm.Sample(branches=_prompts()), max_new_tokens=1)
    _run(engine)
    return engine.scheduler.num_reused_tokens, (_PROMPTS - 1) * _COMMON


def _reused_as_requests() -> tuple[int, int]:
    """The same prompts, one request each, which arrive together."""
    engine = _engine()
    for prompt in _prompts():
        engine.submit(pm.Sample(branches=[prompt]), max_new_tokens=1)
    _run(engine)
    return engine.scheduler.num_reused_tokens, (_PROMPTS - 1) * _COMMON


def _reused_in_chat() -> tuple[int, int]:
    """Turns of a chat: every request repeats all earlier turns, and a branch answers it."""
    engine, text = _engine(), shared_main()
    chat, repeated = list[int](), 0
    for turn in range(_TURNS):
        repeated += len(chat)
        chat += text[turn * _QUESTION : (turn + 1) * _QUESTION]
        header = text[300:304]
        engine.submit(pm.Sample(chat, [header]), max_new_tokens=_ANSWER, ignore_eos=True)
        chat += [*header, *_run(engine)]
    return engine.scheduler.num_reused_tokens, repeated


def _prefix_reuse() -> float:
    """Share of repeated tokens that were found, over the three kinds of work."""
    counts = [_reused_as_branches(), _reused_as_requests(), _reused_in_chat()]
    found, repeated = (sum(column) for column in zip(*counts, strict=True))
    return found / repeated


def _pool_use() -> float:
    """Share of the cache that is in use while samples wait; answers may have 4,096 tokens."""
    engine, text = _engine(_CACHE_TOKENS), shared_main()
    for start in range(_WAITING):
        prompt = text[start : start + 2 * _OWN]
        engine.submit(pm.Sample(branches=[prompt]), max_new_tokens=_MAX_NEW_TOKENS, ignore_eos=True)
    for _ in range(_STEPS):  # the prompts of the admitted samples are computed
        engine.step()
    assert engine.stats().waiting_samples
    stats = engine.stats()
    return stats.held_tokens / stats.cache_tokens


BENCHES = [
    Bench("decoding.branch_prefix_reuse", 0.85, "higher", "ratio", _prefix_reuse),
    Bench("decoding.pool_use_4096", 0.8, "higher", "ratio", _pool_use),
]
