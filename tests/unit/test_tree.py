"""Trees that grow: relations and coordinates by the numbers in which the segments were added."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_tree, walk
from trees import TREES, shape_of

from parallelmind.config import RopeConfig
from parallelmind.tree import (
    JOINED,
    MAIN,
    NO_PARENT,
    PATH,
    SIBLING,
    GrowingTree,
    Tree,
    branch_coordinates,
    relations,
)


def order_of_addition(tree: Tree, data: st.DataObject) -> list[int]:
    """The segments in a random order: each after its parent, and a branch after its earlier siblings."""
    added = [MAIN]
    while len(added) < tree.segments:
        left = [segment for segment in range(tree.segments) if segment not in added]
        possible = [segment for segment in left if tree.parents[segment] in added]
        first = [
            segment
            for segment in possible
            if tree.is_reduce[segment]
            or not any(
                other < segment and tree.parents[other] == tree.parents[segment] and not tree.is_reduce[other]
                for other in left
            )
        ]
        added.append(data.draw(st.sampled_from(first)))
    return added


def grow(tree: Tree, order: list[int]) -> GrowingTree:
    """The tree with its segments numbered in this order."""
    number = np.argsort(order)
    parents = number[tree.parents[order]]
    parents[MAIN] = NO_PARENT
    return GrowingTree(parents, tree.is_reduce[order])


@settings(max_examples=150)
@given(TREES, st.data())
def test_a_growing_tree_has_the_relations_of_the_complete_one(root, data):
    complete = shape_of(root)
    order = order_of_addition(complete, data)
    tree = grow(complete, order)
    reference_tree(root, RopeConfig())
    segments = list(walk(root))
    table = relations(tree)
    for row, query in enumerate(order):
        for column, key in enumerate(order):
            is_path, is_joined = key in segments[query]["path"], key in segments[query]["joined"]
            assert table[row, column] == (PATH if is_path else JOINED if is_joined else SIBLING)
    assert tree.pre_order.tolist() == np.argsort(order).tolist()
    assert tree.complete().parents.tolist() == complete.parents.tolist()
    assert tree.complete().is_reduce.tolist() == complete.is_reduce.tolist()


@given(TREES)
def test_a_tree_that_is_added_in_pre_order_is_the_complete_tree(root):
    complete = shape_of(root)
    tree = GrowingTree(complete.parents, complete.is_reduce)
    assert tree.pre_order.tolist() == list(range(tree.segments))
    assert relations(tree).tolist() == relations(complete).tolist()


def test_a_segment_that_is_added_has_the_next_free_number_as_its_coordinate():
    """Main, two branches and a reduce; then a branch below the first one, and one of main."""
    tree = GrowingTree(np.array([-1, 0, 0, 0, 1, 0]), np.array([False, False, False, True, False, False]))
    assert branch_coordinates(tree, True, 10).tolist() == [0, 10, 20, 0, 40, 50]
    assert branch_coordinates(tree, False, 10).tolist() == [0, 0, 10, 0, 30, 40]
