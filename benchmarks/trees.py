"""Trees against separate rows and flat samples, and packed rows against padded ones.

$GSM8K names a copy of GSM8K's training problems as JSON lines; generated questions replace it.
"""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.harness import Bench, ratio
from benchmarks.learner import Learner
from benchmarks.text import texts, tokenizer
from parallelmind.config import DataConfig, RopeConfig
from parallelmind.data.packing import EpochSeed, SampleBatch, make_batch, sample_batches
from parallelmind.data.record_parser import parse_value
from parallelmind.data.tokenise import tokenise
from parallelmind.evaluation.facts import facts_records
from parallelmind.evaluation.model_support import ATTENTIONS
from parallelmind.evaluation.tiny_models import causal_lm_types, tiny_model
from parallelmind.evaluation.tree_law import tree_distance
from parallelmind.layout import Batch, Tokens
from parallelmind.model.support import assess
from parallelmind.tree import NO_PARENT, Tree, with_context

_MAIN, _BRANCHES, _BRANCH, _LEAVES, _LEAF = 512, 4, 128, 4, 32  # tokens and forks: 16 paths
_ROWS_PER_BATCH = 4  # of 672 tokens each; all of them together do not fit into memory
_LAYOUTS = 64
_PROBLEMS, _BATCH_TOKENS = 80, 2048


def tree_samples(count: int) -> list[Tokens]:
    """Trees of a 512-token main, four branches of 128 tokens, and four branches of 32 tokens on each."""
    parents, lengths = [NO_PARENT], [_MAIN]
    for _ in range(_BRANCHES):
        branch = len(parents)
        parents += [0, *[branch] * _LEAVES]
        lengths += [_BRANCH, *[_LEAF] * _LEAVES]
    tree = Tree(np.array(parents), np.zeros(len(parents), dtype=bool))
    ids = np.resize(np.concatenate([tokenizer().encode(text) for text in texts()]), count * sum(lengths))
    cuts = np.cumsum(lengths)[:-1]
    return [
        Tokens.of_tree([part.tolist() for part in np.split(own, cuts)], tree) for own in np.split(ids, count)
    ]


def path_rows(tokens: Tokens) -> list[Tokens]:
    """One sample of main and a single branch for every leaf; a target of several rows is one in the first."""
    tree, targets, rows = tokens.tree, tokens.targets, []
    for leaf in np.setdiff1d(np.arange(tree.segments), tree.parents):
        kept = np.flatnonzero(with_context(np.arange(tree.segments) == leaf, tree))
        row = Tokens(tokens.ids, tokens.lengths, targets, tree).take(kept)
        main = int(row.lengths[0])
        rows.append(
            Tokens.of(row.ids[:main].tolist(), [row.ids[main:].tolist()], targets=[row.targets[main:]])
        )
        targets = targets & ~np.isin(np.arange(len(targets)), tokens.places(kept))
    return rows


def tree_speedup() -> float:
    """Time of a step on 16 rows over that of a step on the tree whose paths they are; equal targets."""
    rope = RopeConfig(visibility="isolated")
    learner, sample = Learner(rope), tree_samples(1)[0]
    rows = iter(path_rows(sample))
    separate = []
    while group := list(islice(rows, _ROWS_PER_BATCH)):
        separate.append(make_batch(group, rope, pad_id=0))
    tree = make_batch([sample], rope, pad_id=0)
    assert sum(batch.targets for batch in separate) == tree.targets
    return ratio(lambda: learner.step(*separate), lambda: learner.step(tree), repeats=3)


def layout_speed() -> float:
    """Rows/s of the layout of trees over that of flat samples of the same segments."""
    rope, trees = RopeConfig(), tree_samples(_LAYOUTS)
    flat = [Tokens.of(*_main_and_others(sample)) for sample in trees]
    return ratio(lambda: make_batch(flat, rope, 0), lambda: make_batch(trees, rope, 0), repeats=21)


def _main_and_others(sample: Tokens) -> tuple[list[int], list[list[int]]]:
    main, *others = sample.split()
    return main, others


def _problems() -> list[dict[str, str]]:
    """Questions with answers, as standalone records."""
    path = os.environ.get("GSM8K")
    if path:
        lines = Path(path).read_text(encoding="utf-8").splitlines()[:_PROBLEMS]
        problems = [json.loads(line) for line in lines]
        return [{"prompt": f"{item['question']}\n", "completion": item["answer"]} for item in problems]
    records = facts_records(_PROBLEMS, seed=0)
    return [
        {"prompt": f"{record['main']}\n{branch['prompt']}", "completion": branch["completion"]}
        for record in records
        for branch in record["branches"][:1]
    ]


def _epoch(packing: bool) -> list[Batch]:
    """The batches of an epoch of the problems with default settings, cut by tokens."""
    data = DataConfig(data_path="-", batch_tokens=_BATCH_TOKENS, packing=packing)
    records = tokenise([parse_value(problem) for problem in _problems()], tokenizer(), data)
    packed = [record for item in records for record in item.for_packing()]
    batches: list[SampleBatch] = list(sample_batches(packed, data, EpochSeed(0)))
    return [batch.collate(RopeConfig(), 0, packing) for batch in batches]


def packing_speedup() -> float:
    """Time of an epoch of padded batches over that of packed ones."""
    learner, padded, packed = Learner(RopeConfig()), _epoch(False), _epoch(True)
    assert sum(batch.targets for batch in padded) == sum(batch.targets for batch in packed)

    def train(batches: list[Batch]) -> None:
        for batch in batches:
            learner.step(batch)

    return ratio(lambda: train(padded), lambda: train(packed), repeats=3)


def packed_padding() -> float:
    """Share of padding in packed batches."""
    batches = _epoch(True)
    return 1 - sum(batch.tokens for batch in batches) / sum(batch.ids.size for batch in batches)


def worst_law() -> float:
    """Largest distance of law 7 over all supported types and attentions."""
    return max(distance for model_type in causal_lm_types() for distance in _distances(model_type))


def _distances(model_type: str) -> list[float]:
    """Law 7 of a tiny model in each attention; nothing for a type that is not supported."""
    try:
        model = tiny_model(model_type)
    except Exception:  # a type may fail with any error of transformers; docs/models.md lists these
        return []
    if assess(model).reason is not None:
        return []
    distances = []
    for attention in ATTENTIONS if model._supports_sdpa else ATTENTIONS[:1]:
        model.set_attn_implementation(attention)
        distances.append(tree_distance(model))
    return distances


BENCHES = [
    Bench("training.tree16_vs_rows", 6.0, "higher", "ratio", tree_speedup),
    Bench("training.packed_vs_padded", 1.15, "higher", "ratio", packing_speedup),
    Bench("training.packed_padding", 0.02, "lower", "ratio", packed_padding),
    Bench("data.layout_rows_per_s_tree", 0.7, "higher", "ratio", layout_speed),
    Bench("model.tree_law_worst", 1e-5, "lower", "ratio", worst_law),
]
