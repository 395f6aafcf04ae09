"""The parts of a data set that is named by an import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from trainer.config.data_section import DataConfig
from trainer.config.registry import build
from trainer.errors import ConfigError

# Parameters that say which part is made: what they are for the training part, and for the validation part.
PART_PARAMETERS: dict[str, tuple[Any, Any]] = {
    "train": (True, False),
    "split": ("train", "val"),
}
# Names of parts, the first that there is.
VALIDATION_PARTS = ("validation", "val", "valid", "test")


def imported_parts(
    section: DataConfig, target: Callable[..., Any], parameters: set[str]
) -> tuple[Any, Any]:
    """Training and validation part; the second is None if there is none.

    A target with a parameter `train` is called with `train=True`, then `train=False`; else one with a parameter
    `split`, with `split="train"`, then `split="val"`. Any other, and Hugging Face's `datasets`, is called once and
    returns the pair `(train, val)`, a mapping of named parts, or a training set alone. `data.root`, if set, is passed
    as `root`.
    """
    root = _root(section)
    for keyword, (train_value, val_value) in PART_PARAMETERS.items():
        if not _says_part(section, keyword, parameters):
            continue
        if keyword in section.args:
            raise ConfigError(
                f"data.{keyword}",
                "leave it out: it is set once for training, once for validation",
            )
        train = build("data", target, section.args, **root, **{keyword: train_value})
        if section.val_fraction is not None:
            return train, None  # it is taken out of the training part
        val = build("data", target, section.args, **root, **{keyword: val_value})
        return train, val
    data = build("data", target, section.args, **root)
    if isinstance(data, Mapping) and "train" in data:
        return data["train"], _validation_part(data)
    return data if isinstance(data, tuple) and len(data) == 2 else (data, None)


def evaluation_part(
    section: DataConfig, target: Callable[..., Any], *, is_train: bool = False
) -> Any:
    """The validation part alone (or the training part) of the data set of an import path, as `imported_parts`.

    Where its arguments say which part it is, or it is made as one set, it is that set.
    """
    parameters = names_of_parameters(target)
    supplied = _root(section)
    for keyword, (train_value, val_value) in PART_PARAMETERS.items():
        if keyword in section.args:
            break
        if _says_part(section, keyword, parameters):
            supplied[keyword] = train_value if is_train else val_value
            break
    data = build("data", target, section.args, **supplied)
    # A mapping may make its parts when they are taken, so the other one is left alone.
    if isinstance(data, Mapping) and "train" in data:
        part = data["train"] if is_train else _validation_part(data)
        return _only_part(data) if part is None else part
    if isinstance(data, tuple) and len(data) == 2:
        return data[0] if is_train else data[1]
    return data


def _root(section: DataConfig) -> dict[str, Any]:
    return {} if section.root is None else {"root": section.root}


def _says_part(section: DataConfig, keyword: str, parameters: set[str]) -> bool:
    """True if `keyword` tells the target which part to make."""
    # Of a `DatasetDict` the parts are taken by their names, which are not always those.
    return keyword in parameters and not section.name.startswith("datasets.")


def _validation_part(parts: Mapping[str, Any]) -> Any:
    """Of several named parts, as Hugging Face's `DatasetDict` has them, the one to validate on."""
    names = [name for name in VALIDATION_PARTS if name in parts]
    return parts[names[0]] if names else None


def _only_part(parts: Mapping[str, Any]) -> Any:
    """The part of a mapping that has no validation part; raises `ConfigError` where it has several."""
    if len(parts) > 1:
        raise ConfigError(
            "data.name",
            f"has the parts {', '.join(map(str, parts))}, and none to validate on ({', '.join(VALIDATION_PARTS)})",
        )
    return next(iter(parts.values()))


def names_of_parameters(target: Callable[..., Any]) -> set[str]:
    """The names that `target` takes, with `**` among them if it takes any."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return set()
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}
