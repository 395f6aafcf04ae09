"""The named validation sets and the test set of a config: `data.val.<name>` and `data.test`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.fields import ComponentSection, key, read_section, show
from trainer.errors import ConfigError

# Part of a column's name, of a dotted key and of a file's name.
NAME = re.compile(r"[A-Za-z0-9_-]+")
EXAMPLE = "{clean: {}, shifted: {root: PATH}}"


@dataclass(frozen=True, kw_only=True)
class EvaluationSetConfig(ComponentSection):
    """One set. What it leaves out is as in `data`; another `name` takes none of the arguments there."""

    SECTION = "set"  # its place in the config is not known here: `_read` puts it in

    name: str = key("", "as data.name; empty = the same")
    root: str | None = key(None, "as data.root; null = the same", path=True)
    folder: str | None = key(
        None,
        "of data.name=folder: the folder below root that holds the class folders",
        path=True,
    )
    part: Literal["train", "val"] | None = key(
        None, "which part of that data set; null = val"
    )
    transforms: list[dict[str, Any]] | None = key(
        None, "as data.val_transforms; null = the same"
    )

    @property
    def is_plain(self) -> bool:
        """True if it names nothing of its own: it is the validation part of `data`."""
        own = (self.name, self.root, self.folder, self.args)
        return not any(own) and self.part in (None, "val")


def validation_sets(tree: Mapping[str, Any]) -> dict[str, EvaluationSetConfig]:
    """The sets of `data.val`, by name, in their order. Raises `ConfigError`."""
    sets = {}
    for name, entry in tree.items():
        place = f"data.val.{name}"
        if not NAME.fullmatch(name):
            raise ConfigError(
                place,
                "a set's name is part of the names of its metrics: letters, digits, _ and - only",
            )
        sets[name] = _read(place, entry, of=f"data.val names its sets: {EXAMPLE}")
    return sets


def test_set(tree: Mapping[str, Any] | None) -> EvaluationSetConfig | None:
    """The set of `data.test`; None if there is none. Raises `ConfigError`."""
    if tree is None:
        return None
    section = _read("data.test", tree, of="{root: PATH}, for example")
    if section.is_plain and section.part is None:
        raise ConfigError(
            "data.test",
            "names nothing of its own, so its samples would be those of validation; set its folder, root, name or "
            "arguments (part: val if those are meant)",
        )
    return section


def _read(place: str, entry: Any, *, of: str) -> EvaluationSetConfig:
    if entry is not None and not isinstance(entry, Mapping):
        raise ConfigError(place, f"{show(entry)} is not a mapping; {of}")
    try:
        section: EvaluationSetConfig = read_section(EvaluationSetConfig, entry)
    except ConfigError as error:
        rest = error.key.removeprefix(EvaluationSetConfig.SECTION)
        raise ConfigError(f"{place}{rest}", error.message) from None
    return section


def key_of_set(name: str) -> str:
    """The key within a set that the dotted key `name` leads to: `root` for `data.val.clean.root`; "" for others."""
    parts = name.split(".")
    if parts[:2] == ["data", "test"]:
        return ".".join(parts[2:])
    if parts[:2] == ["data", "val"]:
        return ".".join(parts[3:])
    return ""
