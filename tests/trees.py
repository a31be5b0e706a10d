"""Random trees of segments, in the form of `reference`, and their tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from reference import Segment, walk

from parallelmind.layout import Tokens
from parallelmind.tree import Tree

TEXTS = st.lists(st.integers(0, 99), min_size=1, max_size=5)


def _forked(below: st.SearchStrategy[Segment]) -> st.SearchStrategy[Segment]:
    branches = st.lists(below, min_size=1, max_size=3)
    return st.one_of(
        st.fixed_dictionaries({"tokens": TEXTS, "offset": st.integers(0, 5), "branches": branches}),
        st.fixed_dictionaries(
            {"tokens": TEXTS, "offset": st.integers(0, 5), "branches": branches, "reduce": below}
        ),
    )


LEAVES = st.fixed_dictionaries({"tokens": TEXTS, "offset": st.integers(0, 5)})
SEGMENTS = st.recursive(LEAVES, _forked, max_leaves=10)
_MAIN = {
    "tokens": st.lists(st.integers(0, 99), max_size=5),
    "branches": st.lists(SEGMENTS, min_size=1, max_size=4),
}
TREES = st.one_of(st.fixed_dictionaries(_MAIN), st.fixed_dictionaries({**_MAIN, "reduce": SEGMENTS}))


def with_documents(documents: list[list[int]], root: Segment) -> Segment:
    """The segment with these texts as its first branches."""
    texts: list[Segment] = [{"tokens": tokens} for tokens in documents]
    return {**root, "documents": len(documents), "branches": texts + root["branches"]}


DOCUMENT_TREES = st.builds(
    with_documents,
    st.lists(TEXTS, min_size=1, max_size=4),
    st.fixed_dictionaries({**_MAIN, "reduce": SEGMENTS}),
)


def shape_of(root: Segment) -> Tree:
    """The tree of a segment of `reference`, which gets its numbers."""
    segments = list(walk(root))
    for number, segment in enumerate(segments):
        segment["number"] = number
    parents, is_reduce = np.full(len(segments), -1), np.zeros(len(segments), bool)
    for segment in segments:
        for below in segment.get("branches", []):
            parents[below["number"]] = segment["number"]
        if "reduce" in segment:
            parents[segment["reduce"]["number"]] = segment["number"]
            is_reduce[segment["reduce"]["number"]] = True
    return Tree(parents, is_reduce, root.get("documents", 0))


def tokens_of(root: Segment) -> Tokens:
    """The tokens of a segment of `reference`, whose targets begin at its offset."""
    segments = list(walk(root))
    targets = [
        np.arange(len(segment["tokens"])) >= segment.get("offset", len(segment["tokens"]))
        for segment in segments
    ]
    return Tokens.of_tree([segment["tokens"] for segment in segments], shape_of(root), targets=targets[1:])
