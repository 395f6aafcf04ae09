"""The path that a backward takes: autograd's nodes from a loss back to a model's first parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def chain(loss: Tensor, module: nn.Module) -> list[dict[str, Any]]:
    """The longest path from `loss` to its model's first trained parameter that the loss depends on.

    Each node has its `name`, and the `parameters` whose gradients it gives. Longest, because residual branches
    offer short cuts, and a path past them would name the fewest layers.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    order = _from_leaves(loss.grad_fn)
    leaves = {id(node): names[id(node.variable)] for node in order if id(getattr(node, "variable", None)) in names}
    rank = {name: place for place, name in enumerate(names.values())}
    goal = min(leaves, key=lambda leaf: rank[leaves[leaf]], default=None)
    ahead: dict[int, tuple[int, Any]] = {}  # of a node with a path to the goal: the path's length, the next node
    for node in order:
        if id(node) == goal:
            ahead[id(node)] = 0, None
        routes = [(ahead[id(after)][0] + 1, after) for after, _ in node.next_functions if id(after) in ahead]
        if routes:
            ahead[id(node)] = max(routes, key=lambda route: route[0])
    found = []
    node = loss.grad_fn if id(loss.grad_fn) in ahead else None
    while node is not None:
        following = ahead[id(node)][1]
        ends = [id(after) if after is following else _end(after) for after, _ in node.next_functions]
        found.append({"name": node.name(), "parameters": [leaves[end] for end in ends if end in leaves]})
        node = following
    return found


def _end(node: Any) -> int:
    """Where a path without forks ends: a linear layer's weight is a transposition away."""
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return id(node)


def _from_leaves(root: Any) -> list[Any]:
    """All nodes under `root`, each after those that it leads to; without recursion, as graphs are deep."""
    order: list[Any] = []
    seen: set[int] = set()
    waiting = [] if root is None else [(root, False)]
    while waiting:
        node, done = waiting.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            waiting.append((node, True))
            waiting += [(after, False) for after, _ in node.next_functions if after is not None]
    return order
