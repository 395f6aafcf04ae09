"""What a change replaces besides its own key: a component's name takes the old component's arguments with it.

A file says `optimizer: {name: sgd, momentum: 0.9}`. `optimizer.name=adamw` means another optimizer, and not "AdamW with
a momentum". What is given beside the new name, in the same overrides, stays and is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.fields import ComponentSection, current_path, declared_keys
from trainer.config.schema import SECTIONS
from trainer.config.trees import Tree

# Packages whose members have short names here: `torch.optim.SGD` is `sgd`.
SHORT_NAMED = ("torch.optim.", "torchvision.models.")


def replace_components(
    tree: Tree, changes: Mapping[str, Any], source: str
) -> list[str]:
    """Remove from `tree`, the config of `source`, what belongs to a component or metric that `changes` replace.

    Returns a line for each that says what was left out.
    """
    notes = []
    for name, cls in SECTIONS.items():
        section, change = tree.get(name), changes.get(name)
        if not isinstance(section, dict) or not isinstance(change, Mapping):
            continue
        if name == "best":
            notes += _replace_metric(section, change, source)
        elif issubclass(cls, ComponentSection):
            notes += _replace_component(cls, section, change, source)
    return notes


def _replace_component(
    cls: Any, section: Tree, change: Mapping[str, Any], source: str
) -> list[str]:
    keys = declared_keys(cls)
    before = section.get("name", keys["name"].default)
    now = change.get("name", before)
    if _is_same(before, now):
        return []
    arguments = [name for name in section if name not in keys]
    for name in arguments:
        del section[name]
    left_out = [str(name) for name in arguments if name not in change]
    if not left_out:
        return []
    return [
        f"{cls.SECTION}.name={now} replaces {before}, whose arguments in {source} are left out: {', '.join(left_out)}"
    ]


def _replace_metric(section: Tree, change: Mapping[str, Any], source: str) -> list[str]:
    """The mode of a metric says nothing of another one."""
    before = section.get("metric", declared_keys(SECTIONS["best"])["metric"].default)
    now = change.get("metric", before)
    if now == before or section.get("mode") is None or "mode" in change:
        return []
    mode = section.pop("mode")
    return [
        f"best.metric={now} replaces {before}, whose best.mode={mode} in {source} is left out"
    ]


def _is_same(before: Any, now: Any) -> bool:
    """True if both names mean one component, by its short name or by its import path."""
    return now is None or _short(before) == _short(now)


def _short(name: Any) -> str:
    path = current_path(str(name))
    for package in SHORT_NAMED:
        if path.startswith(package):
            return path.rpartition(".")[2].lower()
    return path
