"""Nested mappings and lists, as YAML gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Tree = dict[str, Any]


def leaves_in(tree: Any) -> Iterator[Any]:
    """Every value that is neither a mapping nor a list."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from leaves_in(item)
    else:
        yield tree


def texts_in(tree: Any) -> Iterator[str]:
    """Every text among the leaves."""
    for leaf in leaves_in(tree):
        if isinstance(leaf, str):
            yield leaf


def map_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy with `change(leaf)` in the place of each leaf."""
    if isinstance(tree, Mapping):
        return {name: map_leaves(item, change) for name, item in tree.items()}
    if isinstance(tree, list | tuple):
        return [map_leaves(item, change) for item in tree]
    return change(tree)
