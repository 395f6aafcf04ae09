"""The path of a backward pass: autograd's nodes from a loss back to a model's first parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def chain(loss: Tensor, module: nn.Module) -> list[dict[str, Any]]:
    """The longest path from `loss` to the model's first trained parameter that the loss depends on.

    Each entry has a node's `name` and the names of the `parameters` whose gradients that node computes. The longest
    path, because residual branches are short cuts, and the shortest one would pass the fewest layers.
    """
    order = _post_order(loss.grad_fn)
    leaves = _name_leaves(order, module)
    if not leaves:
        return []
    path = _longest_path(order, goal=next(iter(leaves)))
    entries = []
    for node, following in zip(path, [*path[1:], None], strict=True):
        parameters = []
        for after, _ in node.next_functions:
            leaf = after if after is following else _skip_unary_nodes(after)
            if leaf in leaves:
                parameters.append(leaves[leaf])
        entries.append({"name": node.name(), "parameters": parameters})
    return entries


def _name_leaves(nodes: list[Any], module: nn.Module) -> dict[Any, str]:
    """The nodes that accumulate a parameter's gradient, each with the parameter's name, in the model's order."""
    accumulators = {}
    for node in nodes:
        variable = getattr(node, "variable", None)
        if variable is not None:
            accumulators[id(variable)] = node
    leaves = {}
    for name, parameter in module.named_parameters():
        node = accumulators.get(id(parameter))
        if node is not None:
            leaves[node] = name
    return leaves


def _longest_path(order: list[Any], goal: Any) -> list[Any]:
    """The nodes of the longest path from the last node of `order` to `goal`, [] if there is none.

    In post-order, the longest paths onwards from a node are known when the node's turn comes.
    """
    lengths = {goal: 0}  # of nodes with a path to the goal
    following = {}  # the next node on that path
    for node in order:
        for after, _ in node.next_functions:
            if after in lengths and lengths[after] >= lengths.get(node, 0):
                lengths[node] = lengths[after] + 1
                following[node] = after
    path = []
    node = order[-1]
    while node in lengths:
        path.append(node)
        node = following.get(node)
    return path


def _skip_unary_nodes(node: Any) -> Any:
    """The end of a path without forks: a linear layer's weight is behind a transposition, for example."""
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node


def _post_order(root: Any) -> list[Any]:
    """All nodes that `root` leads to, and `root`, each after those that it leads to.

    Without recursion, since graphs are deeper than Python's stack.
    """
    order: list[Any] = []
    visited: set[Any] = set()
    stack = [] if root is None else [(root, False)]
    while stack:
        node, is_expanded = stack.pop()
        if is_expanded:
            order.append(node)
        elif node not in visited:
            visited.add(node)
            stack.append((node, True))
            for after, _ in node.next_functions:
                if after is not None:
                    stack.append((after, False))
    return order
