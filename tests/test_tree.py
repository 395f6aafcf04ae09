"""The fixed tree: the same additions for any way to share out the leaves."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from trainer.exact.tree import TreeSum, nodes_of_range


def added(left: str, right: str) -> str:
    return f"({left}+{right})"


def by_definition(leaves: int, level: int, index: int) -> str:
    """Node (level, index), straight from the definition."""
    if level == 0:
        return str(index)
    left, right = 2 * index, 2 * index + 1
    side = by_definition(leaves, level - 1, left)
    return added(side, by_definition(leaves, level - 1, right)) if right << (level - 1) < leaves else side


def root_level(leaves: int) -> int:
    return math.ceil(math.log2(leaves)) if leaves > 1 else 0


@given(st.integers(1, 70), st.data())
def test_any_sharing_out_makes_the_same_additions(leaves: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, leaves), max_size=9)))
    whole: TreeSum[str] = TreeSum(leaves, added)
    for first, last in itertools.pairwise([0, *cuts, leaves]):
        part: TreeSum[str] = TreeSum(leaves, added)
        for leaf in range(first, last):
            part.push((0, leaf), str(leaf))
        assert [node for node, _ in part.nodes] == nodes_of_range(first, last, leaves)
        for (level, index), value in part.nodes:
            assert value == by_definition(leaves, level, index)
            whole.push((level, index), value)
    assert whole.root() == by_definition(leaves, root_level(leaves), 0)


@given(st.integers(1, 500), st.data())
def test_a_range_folds_into_few_nodes(leaves: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, leaves - 1))
    last = data.draw(st.integers(first + 1, leaves))
    assert len(nodes_of_range(first, last, leaves)) <= max(1, 2 * root_level(leaves))


def test_seven_leaves() -> None:
    assert by_definition(7, 3, 0) == "(((0+1)+(2+3))+((4+5)+6))"
    assert nodes_of_range(3, 7, 7) == [(0, 3), (2, 1)]
