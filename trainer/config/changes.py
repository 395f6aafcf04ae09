"""What is laid over a config: keys that get another value, and keys that are unset.

The command line is laid over a file, and a file over its base, by the same rules: mappings are merged key by key, a
list replaces a list, `{0: …}` changes items of a list by their numbers, another component leaves the old one's
arguments behind (see `switch`), and an unset key is as if it had never been set.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from trainer.config.fields import show
from trainer.config.interpolation import as_config_error
from trainer.config.several_optimizers import refuse_several_optimizers
from trainer.config.switch import replace_components
from trainer.config.trees import Tree
from trainer.errors import ConfigError, nearest

UNSET = "~"  # before the name of a key that is unset


class Changes(NamedTuple):
    """Nested mappings to lay over others, interpolations still in them, and the dotted keys to unset before.

    `unset` says of each key whether it is a mistake if nothing has set it.
    """

    tree: Tree
    unset: dict[str, bool]


def take_unset(tree: Tree, prefix: str = "") -> dict[str, bool]:
    """Remove every `~key:` without a value from a file's mappings; returns the dotted keys to unset."""
    unset = {}
    for name, value in list(tree.items()):
        key = str(name)
        if value is None and key.startswith(UNSET) and len(key) > 1:
            del tree[name]
            unset[f"{prefix}{key.removeprefix(UNSET)}"] = True
        elif isinstance(value, dict):
            unset |= take_unset(value, f"{prefix}{key}.")
    return unset


def lay_over(tree: Tree, changes: Changes, source: str) -> tuple[Tree, list[str]]:
    """`tree`, which came from `source`, under `changes`; and a line for each component that was replaced.

    Changes `tree`. Raises `ConfigError` for a key that is unset and was not set, and for a mapping over a list.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, must_be_set in changes.unset.items():
        _unset(tree, key, source, must_be_set)
    notes = replace_components(tree, changes.tree, source)
    changed = _with_whole_lists(tree, changes.tree, "")
    refuse_several_optimizers(changed.get("optimizer"))
    _check_kinds(tree, changed)
    try:
        config: Any = OmegaConf.create(tree, flags={"allow_objects": True})
        config.merge_with(OmegaConf.create(changed, flags={"allow_objects": True}))
    except OmegaConfBaseException as error:
        raise as_config_error(error) from None
    merged: Tree = cast(Any, OmegaConf.to_container(config))
    return merged, notes


def _with_whole_lists(before: Any, after: Any, key: str) -> Any:
    """`after`, what is laid over `before`: with a whole list where it changes items of one, `{0: …}`."""
    if not isinstance(after, dict):
        return after
    are_numbers = all(str(name).isdecimal() for name in after)
    if isinstance(before, list) and are_numbers:
        return _with_changed_items(before, after, key)
    names = _names_in(before)
    changed = {}
    for name, value in after.items():
        text = str(name)
        inner = before[names[text]] if text in names else None
        inner_key = f"{key}.{text}".lstrip(".")
        changed[name] = _with_whole_lists(inner, value, inner_key)
    return changed


def _with_changed_items(before: list[Any], after: Tree, key: str) -> list[Any]:
    items = list(before)
    for number, value in after.items():
        place = f"{key}[{number}]"
        index = int(number)
        if index >= len(items):
            raise ConfigError(place, f"there are {len(items)} items, from 0 on")
        items[index] = _merged(items[index], value, place)
    return items


def _merged(before: Any, after: Any, key: str) -> Any:
    """An item of a list with `after` laid over it."""
    after = _with_whole_lists(before, after, key)
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    merged = dict(before)
    for name, value in after.items():
        merged[name] = _merged(before.get(name), value, f"{key}.{name}")
    return merged


def _unset(tree: Tree, key: str, source: str, must_be_set: bool) -> None:
    *parents, last = key.split(".")
    mapping: Any = tree
    for name in parents:
        mapping = mapping.get(name) if isinstance(mapping, dict) else None
    names = _names_in(mapping)
    if last in names:
        del mapping[names[last]]
    elif must_be_set:
        hint = nearest(last, names)
        raise ConfigError(key, f"is not set in {source}, so it cannot be unset{hint}")


def _names_in(mapping: Any) -> dict[str, Any]:
    """The keys of a mapping by their text: YAML has numbers as keys, in `model.unfreeze` for example."""
    if not isinstance(mapping, dict):
        return {}
    return {str(name): name for name in mapping}


def _check_kinds(tree: Tree, changes: Tree, prefix: str = "") -> None:
    """Raise `ConfigError` where a mapping would be laid over a list, or a list over a mapping."""
    for name in tree.keys() & changes.keys():
        before, after = tree[name], changes[name]
        kinds = {type(before), type(after)}
        if kinds == {dict, list}:
            raise ConfigError(
                f"{prefix}{name}",
                f"{show(after)} is laid over {show(before)}, and a list and a mapping do not fit together",
            )
        if kinds == {dict}:
            _check_kinds(before, after, f"{prefix}{name}.")
