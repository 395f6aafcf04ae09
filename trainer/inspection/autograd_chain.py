"""The path of a backward pass: autograd's nodes from a loss back to a model's first parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def chain(loss: Tensor, module: nn.Module) -> list[dict[str, Any]]:
    """The longest path from `loss` to the model's first trained parameter that the loss depends on.

    Each entry has a node's `name` and the names of the `parameters` whose gradients that node computes. The longest
    path, because residual branches are short cuts, and the shortest one would pass the fewest layers.
    """
    nodes = post_order(loss.grad_fn)
    accumulators = _name_accumulators(nodes, module)
    if not accumulators:
        return []
    path = _longest_path(nodes, goal=next(iter(accumulators)))
    entries = []
    for node, next_node in zip(path, [*path[1:], None], strict=True):
        parameters = []
        for successor, _ in node.next_functions:
            end = successor if successor is next_node else _skip_unary_nodes(successor)
            if end in accumulators:
                parameters.append(accumulators[end])
        entries.append({"name": node.name(), "parameters": parameters})
    return entries


def _name_accumulators(nodes: list[Any], module: nn.Module) -> dict[Any, str]:
    """The nodes that accumulate a parameter's gradient, each with the parameter's name, in the model's order."""
    nodes_by_parameter = {}
    for node in nodes:
        variable = getattr(node, "variable", None)
        if variable is not None:
            nodes_by_parameter[id(variable)] = node
    names = {}
    for name, parameter in module.named_parameters():
        node = nodes_by_parameter.get(id(parameter))
        if node is not None:
            names[node] = name
    return names


def _longest_path(nodes: list[Any], goal: Any) -> list[Any]:
    """The nodes of the longest path from the last of `nodes` to `goal`, [] if there is none.

    `nodes` are in post-order, so a node comes after all that its paths lead through.
    """
    lengths = {goal: 0}  # of the longest path from a node to the goal
    next_nodes = {}  # on that path
    for node in nodes:
        for successor, _ in node.next_functions:
            if successor in lengths and lengths[successor] >= lengths.get(node, 0):
                lengths[node] = lengths[successor] + 1
                next_nodes[node] = successor
    path = []
    node = nodes[-1]
    while node in lengths:
        path.append(node)
        node = next_nodes.get(node)
    return path


def _skip_unary_nodes(node: Any) -> Any:
    """The end of a path without forks: a linear layer's weight is behind a transposition, for example."""
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node


def post_order(root: Any) -> list[Any]:
    """All nodes that `root` leads to, and `root`, each after those that it leads to.

    Without recursion, because graphs are deeper than Python's stack.
    """
    nodes: list[Any] = []
    visited: set[Any] = set()
    stack = [] if root is None else [(root, False)]
    while stack:
        node, is_expanded = stack.pop()
        if is_expanded:
            nodes.append(node)
        elif node not in visited:
            visited.add(node)
            stack.append((node, True))
            for successor, _ in node.next_functions:
                if successor is not None:
                    stack.append((successor, False))
    return nodes
