"""The fixed tree: the same additions for any way to share out the micro-batches."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from trainer.exact.tree import Node, TreeSum, nodes_of_range


def add(left: str, right: str) -> str:
    return f"({left}+{right})"


def sum_by_definition(count: int, level: int, position: int) -> str:
    """A node's sum, of `count` micro-batches in all, straight from the definition."""
    if level == 0:
        return str(position)
    left, right = 2 * position, 2 * position + 1
    left_sum = sum_by_definition(count, level - 1, left)
    if right << (level - 1) >= count:
        return left_sum
    return add(left_sum, sum_by_definition(count, level - 1, right))


def root_level(count: int) -> int:
    return math.ceil(math.log2(count)) if count > 1 else 0


@given(st.integers(1, 70), st.data())
def test_any_sharing_out_makes_the_same_additions(
    count: int, data: st.DataObject
) -> None:
    bounds = sorted(data.draw(st.lists(st.integers(0, count), max_size=9)))
    whole: TreeSum[str] = TreeSum(count, add)
    for first, end in itertools.pairwise([0, *bounds, count]):
        part: TreeSum[str] = TreeSum(count, add)
        for index in range(first, end):
            part.push(Node(0, index), str(index))
        assert [node for node, _ in part.nodes] == nodes_of_range(first, end, count)
        for node, value in part.nodes:
            assert value == sum_by_definition(count, *node)
            whole.push(node, value)
    assert whole.root() == sum_by_definition(count, root_level(count), 0)


@given(st.integers(1, 500), st.data())
def test_a_range_is_left_as_few_nodes(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(first + 1, count))
    assert len(nodes_of_range(first, end, count)) <= max(1, 2 * root_level(count))


def test_seven_micro_batches() -> None:
    assert sum_by_definition(7, 3, 0) == "(((0+1)+(2+3))+((4+5)+6))"
    assert nodes_of_range(3, 7, 7) == [(0, 3), (2, 1)]


def test_a_node_comes_back_as_part_of_its_parent() -> None:
    tree_sum: TreeSum[str] = TreeSum(4, add)
    tree_sum.push(Node(0, 0), "0")
    assert tree_sum.pop(Node(0, 2)) is None
    assert tree_sum.pop(Node(0, 0)) == "0"
    assert tree_sum.pop(Node(0, 0)) is None
    tree_sum.push(Node(1, 0), "(0+1)")
    assert tree_sum.nodes == [((1, 0), "(0+1)")]
