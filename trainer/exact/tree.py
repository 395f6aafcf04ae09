"""A fixed binary tree of sums over a step's micro-batches: the same additions, whoever makes which of them.

Floating-point addition is not associative, so two sums agree bit for bit only if they make the same additions. This
tree depends on the number of micro-batches alone. A rank sums its contiguous range into the largest whole nodes
within it, at most 2 log2(micro-batches) of them. Whoever has the nodes of all ranks finishes the same tree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class Node(NamedTuple):
    """The sum of those micro-batches from `position · 2^level` to before `(position + 1) · 2^level` that there are."""

    level: int
    position: int

    @property
    def is_right(self) -> bool:
        """True if the parent adds this node to its left sibling."""
        return self.position % 2 == 1

    @property
    def left_sibling(self) -> Node:
        return Node(self.level, self.position - 1)

    @property
    def parent(self) -> Node:
        return Node(self.level + 1, self.position // 2)


class TreeSum(Generic[Value]):
    """Adds up nodes that come from left to right, each sum as soon as both its sides are there.

    `nodes` has those that wait for more, with their values. At most one of each level waits for its right sibling, so
    about log2(micro_batches) values are held at once. `add(left, right)` returns the sum and may reuse `left`.
    """

    def __init__(
        self, micro_batches: int, add: Callable[[Value, Value], Value]
    ) -> None:
        self._micro_batches = micro_batches
        self._add = add
        self.nodes: list[tuple[Node, Value]] = []

    def push(self, node: Node, value: Value) -> None:
        """Add the next node to the right of all before it."""
        while not self._must_wait(node):
            if node.is_right:
                _, left = self.nodes.pop()
                value = self._add(left, value)
            # A left node without a sibling is all that its parent sums.
            node = node.parent
        self.nodes.append((node, value))

    def pop(self, node: Node) -> Value | None:
        """Remove the last node and return its value, if it is `node`; it comes back as part of its parent."""
        if not self.nodes or self.nodes[-1][0] != node:
            return None
        return self.nodes.pop()[1]

    def root(self) -> Value:
        """The sum of all micro-batches, once all are in."""
        assert len(self.nodes) == 1, "some micro-batches are missing"
        node, value = self.nodes[0]
        assert self._is_root(node), "some micro-batches are missing"
        return value

    def _must_wait(self, node: Node) -> bool:
        """True for the root, and for a node whose sibling is still to come or belongs to another rank."""
        if node.is_right:
            return not self.nodes or self.nodes[-1][0] != node.left_sibling
        has_right_sibling = (node.position + 1) << node.level < self._micro_batches
        return has_right_sibling or self._is_root(node)

    def _is_root(self, node: Node) -> bool:
        return node.position == 0 and 1 << node.level >= self._micro_batches


@cache
def nodes_of_range(first: int, end: int, micro_batches: int) -> list[Node]:
    """The nodes that are left once the micro-batches `[first, end)` of `micro_batches` are summed."""
    tree_sum: TreeSum[None] = TreeSum(micro_batches, _add_nothing)
    for index in range(first, end):
        tree_sum.push(Node(0, index), None)
    return [node for node, _ in tree_sum.nodes]


def _add_nothing(left: None, right: None) -> None:
    """The sum of two nodes that have no values."""
