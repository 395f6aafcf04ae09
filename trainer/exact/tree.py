"""A fixed binary tree of sums over a step's micro-batches: the same additions, whoever makes which of them.

Floating-point addition is not associative, so a sum is the same, bit for bit, only if its additions are. The tree
over `leaves` micro-batches is that of their number alone: the node (level, index) sums the micro-batches
[index · 2^level, (index + 1) · 2^level), those there are. A rank folds its contiguous range into the largest
whole nodes within it, at most 2 log2(leaves) of them; whoever has the nodes of all ranks finishes the same tree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Generic, TypeVar

Node = tuple[int, int]  # level, index
Value = TypeVar("Value")


class TreeSum(Generic[Value]):
    """Adds up nodes that are pushed from left to right, each sum as soon as both its sides are there.

    At most one node of each level waits for its sibling, so a rank holds about log2(leaves) values at once.
    """

    def __init__(self, leaves: int, add: Callable[[Value, Value], Value]) -> None:
        self._leaves = leaves
        self._add = add
        self.nodes: list[tuple[Node, Value]] = []

    def push(self, node: Node, value: Value) -> None:
        """Take the next node to the right of all before it."""
        self.nodes.append((node, value))
        while self._join():
            pass

    def take(self, node: Node) -> Value | None:
        """The value of the last node, to be pushed again as part of its parent, if the last node is this one."""
        return self.nodes.pop()[1] if self.nodes and self.nodes[-1][0] == node else None

    def _join(self) -> bool:
        """Make the parent of the last node, if its sibling is there or there is none to wait for."""
        (level, index), value = self.nodes[-1]
        if index % 2:
            if len(self.nodes) < 2 or self.nodes[-2][0] != (level, index - 1):
                return False
            value = self._add(self.nodes[-2][1], value)
            del self.nodes[-2]
        elif (index + 1) << level < self._leaves or (index == 0 and 1 << level >= self._leaves):
            return False  # the sibling is to come, or this is the root
        self.nodes[-1] = (level + 1, index // 2), value
        return True

    def root(self) -> Value:
        """The sum of all leaves, once all are in."""
        ((level, index), value), *rest = self.nodes
        assert not rest, "some leaves are missing"
        assert index == 0, "some leaves are missing"
        assert 1 << level >= self._leaves, "some leaves are missing"
        return value


@cache
def nodes_of(first: int, last: int, leaves: int) -> list[Node]:
    """The nodes into which the leaves [first, last) of `leaves` fold."""
    fold: TreeSum[None] = TreeSum(leaves, lambda left, right: None)
    for leaf in range(first, last):
        fold.push((0, leaf), None)
    return [node for node, _ in fold.nodes]
