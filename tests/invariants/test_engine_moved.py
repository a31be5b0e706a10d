"""A sample that is resumed on another engine, after any step, gets the same tokens as on the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
from engines import tiny_engine
from tiny import tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import ResumeState, Sample, Segment, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.evaluation.tiny_models import tiny_model
from parallelmind.layout import Tokens
from parallelmind.tree import Tree

MAIN, BRANCHES = list(range(50, 70)), [[5, 6, 7], [8], list(range(100, 112))]
LATE, REDUCE = [31, 32], [41, 42, 43]
LENGTHS = [9, 4, 6]
CONFIGS = [
    RopeConfig(visibility=visibility, positions=positions, align_to=align, rope_2d_ratio=0.5)
    for visibility, positions, align in product(("columnar", "isolated"), ("time", "flat"), ("left", "right"))
]
SAMPLING = {
    "greedy": {},
    "seeded": {"temperature": 1.5, "seed": 3},
    "stopped": {"stop": ["e"], "repetition_penalty": 1.3},
}


class Client:
    """The state of a sample that a server keeps for a failed engine: request, progress and texts."""

    def __init__(self, request: TokenizedRequest) -> None:
        self.request, self.texts = request, [""] * request.num_branches
        empty = [[] for _ in range(request.num_branches)]
        self.progress = ResumeState([None] * len(empty), empty, [None] * len(empty))
        self.has_started = False

    def start(self, engine: Engine) -> int:
        """Submit the sample, or resume it at its progress."""
        sample_id = engine.enqueue(self.request, resume=self.progress if self.has_started else None)
        self.has_started = True
        self._record_starts(engine, sample_id)
        return sample_id

    def step(self, engine: Engine) -> None:
        for event in engine.step():
            start = event.start_pos2d(int(self.request.tokens.lengths[event.branch + 1]))
            if start and self.progress.start_times[event.branch] is None:
                self.progress.start_times[event.branch] = start[1]
            self.texts[event.branch] += event.text
            self.progress.token_ids[event.branch] += [] if event.token is None else [event.token]
            self.progress.finish_reasons[event.branch] = event.finish_reason

    def join(self, engine: Engine, sample_id: int) -> None:
        engine.join(sample_id, LATE, max_new_tokens=5, ignore_eos=True)
        self._add_branch(LATE, SamplingParams(max_new_tokens=5, ignore_eos=True))
        self._record_starts(engine, sample_id)

    def fork(
        self, engine: Engine, sample_id: int, branch: int, prompts: list[list[int]], settings: dict[str, Any]
    ) -> None:
        engine.fork(sample_id, branch, prompts, **settings)
        for prompt in prompts:
            self._add_branch(prompt, SamplingParams.of(settings), parent=branch + 1)
        self._record_starts(engine, sample_id)

    def _add_branch(self, prompt: list[int], params: SamplingParams, parent: int = 0) -> None:
        added = TokenizedRequest(Tokens.of_tree([[], prompt], Tree.flat(1)), [params])
        self.request = self.request.extend(added, parent)
        self.progress.start_times.append(None)
        self.progress.token_ids.append([])
        self.progress.finish_reasons.append(None)
        self.texts.append("")

    def _record_starts(self, engine: Engine, sample_id: int) -> None:
        starts = (pos2d and pos2d[1] for pos2d in engine.start_pos2d(sample_id))
        self.progress.start_times[:] = starts


def make_request(
    reduce: bool, settings: dict[str, Any], lengths: Sequence[int] = LENGTHS
) -> TokenizedRequest:
    per_branch = [{"max_new_tokens": length} for length in lengths]
    sampling = {**settings, "ignore_eos": True, "max_new_tokens": 5}
    reduce_prompt = REDUCE if reduce else None
    return tokenize_request(tiny_tokenizer(), Sample(MAIN, BRANCHES), per_branch, reduce_prompt, sampling)


def decode_moved(
    make_engine: Callable[[], Engine], settings: dict[str, Any], move_at: int, joins: bool, reduce: bool
) -> Client:
    """Decode a sample that moves to another engine after so many steps (never if negative).

    One branch is cancelled, and one may join late.
    """
    client, engine, num_steps = Client(make_request(reduce, settings)), make_engine(), 0
    sample_id, token_ids = client.start(engine), client.progress.token_ids
    joined, cancelled = not joins, False
    while engine.busy:
        if num_steps == move_at:
            engine = make_engine()
            sample_id = client.start(engine)
        if not joined and len(token_ids[0]) == 2:
            client.join(engine, sample_id)
            joined = True
        if not cancelled and len(token_ids[2]) == 3:
            engine.cancel(sample_id, 2)
            cancelled = True
        client.step(engine)
        num_steps += 1
    return client


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.visibility}-{config.positions}-{config.align_to}"
)
@pytest.mark.parametrize("settings", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize(
    ("joins", "reduce"), [(False, False), (True, False), (False, True)], ids=["", "joined", "reduced"]
)
def test_a_moved_sample_gets_the_same_tokens(
    config: RopeConfig, settings: dict[str, Any], joins: bool, reduce: bool
) -> None:
    def make_engine() -> Engine:
        return tiny_engine(config, max_prefill_tokens=16)

    whole = decode_moved(make_engine, settings, -1, joins, reduce)
    for move_at in range(1, 12, 3):
        if (joins and move_at in (3, 4, 5)) or move_at == 5:
            continue  # a branch that has joined or was cancelled has no event yet
        moved = decode_moved(make_engine, settings, move_at, joins, reduce)
        assert moved.progress.token_ids == whole.progress.token_ids, move_at
        assert moved.texts == whole.texts, move_at
        assert moved.progress.finish_reasons == whole.progress.finish_reasons, move_at


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.visibility}-{config.positions}-{config.align_to}"
)
def test_a_moved_sample_of_documents_gets_the_same_answer(config: RopeConfig) -> None:
    """The branches are only read. At step 0 no event of them has been received."""

    def decode(move_at: int) -> Client:
        engine = tiny_engine(config, max_prefill_tokens=16)
        client, num_steps = Client(make_request(reduce=True, settings={}, lengths=[0] * len(BRANCHES))), 0
        client.start(engine)
        while engine.busy:
            if num_steps == move_at:
                engine = tiny_engine(config, max_prefill_tokens=16)
                client.start(engine)
            client.step(engine)
            num_steps += 1
        return client

    whole = decode(-1)
    assert list(map(len, whole.progress.token_ids)) == [0, 0, 0, 5]
    assert whole.progress.finish_reasons == ["length"] * 4
    for move_at in (0, 1, 4):
        moved = decode(move_at)
        assert (moved.progress, moved.texts) == (whole.progress, whole.texts), move_at


TREE = Sample(
    MAIN,
    [
        Segment(BRANCHES[0], [[21], Segment([22, 23], sampling={"max_new_tokens": 0})], reduce=[24]),
        Segment(BRANCHES[1], [Segment([25], [[26]])]),
    ],
    reduce=Segment(REDUCE, [[27], [28, 29]]),
)
TREE_SIZE = 10


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.visibility}-{config.positions}-{config.align_to}"
)
def test_a_moved_tree_gets_the_same_tokens(config: RopeConfig) -> None:
    """One branch is forked while it runs, and a segment that waits for its start is cancelled."""
    settings = {"temperature": 1.5, "seed": 3, "ignore_eos": True, "max_new_tokens": 4}

    def decode(move_at: int) -> tuple[Client, int]:
        engine = tiny_engine(config, max_prefill_tokens=16)
        client = Client(tokenize_request(tiny_tokenizer(), TREE, None, None, settings))
        sample_id, num_steps = client.start(engine), 0
        while engine.busy:
            if num_steps == move_at:
                engine = tiny_engine(config, max_prefill_tokens=16)
                sample_id = client.start(engine)
            if len(client.progress.token_ids[0]) == 2 and client.request.num_branches == TREE_SIZE:
                client.fork(engine, sample_id, 0, [[61], [62, 63]], settings)
                engine.cancel(sample_id, 6)
            client.step(engine)
            num_steps += 1
        return client, num_steps

    whole, num_steps = decode(-1)
    reasons = whole.progress.finish_reasons
    assert (reasons[0], reasons[6], None in reasons) == ("forked", "cancelled", False)
    for move_at in range(1, num_steps):
        moved, _ = decode(move_at)
        assert (moved.progress, moved.texts) == (whole.progress, whole.texts), move_at


def test_a_moved_sample_of_a_recurrent_model_gets_the_same_tokens() -> None:
    def make_engine() -> Engine:
        return Engine(tiny_model("mamba2"), tiny_tokenizer(), EngineConfig(cache_tokens=512))

    whole = decode_moved(make_engine, {}, -1, joins=False, reduce=False)
    for move_at in (1, 3, 7):
        moved = decode_moved(make_engine, {}, move_at, joins=False, reduce=False)
        assert moved.texts == whole.texts
