"""One part of a data set, as somebody gives it: is it a data set at all, and what are its classes called?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.data.conversion import target_key
from trainer.data.names import normal_form
from trainer.data.streams import way_out
from trainer.errors import ConfigError, DataError, config_error


def class_names(dataset: Any) -> list[str] | None:
    """The names of a data set's classes, by id: its `classes`, or those of its `features` (Hugging Face's)."""
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if names is None and isinstance(features, Mapping):
        key = target_key(features)
        names = None if key is None else getattr(features[key], "names", None)
    if not isinstance(names, list | tuple) or not names:
        return None
    return list(names) if all(isinstance(name, str) for name in names) else None


def shared_class_names(train: Any, val: Any) -> list[str] | None:
    """The names of the training data's classes.

    Raises `ConfigError` if the validation data give one id another name: their labels would be read as other classes.
    """
    names, names_of_val = class_names(train), class_names(val)
    for number, (name, other) in enumerate(
        zip(names or [], names_of_val or [], strict=False)
    ):
        if normal_form(name) != normal_form(other):
            raise ConfigError(
                "data.name",
                f'class {number} is "{name}" in the training data and "{other}" in the validation data; give both one '
                f"list `classes`, and targets by it",
            )
    return names


def check_part(source: str, part: str, data: Any, key: str = "data.name") -> None:
    """Raise `ConfigError` unless `data` gives samples by id, `DataError` if there are none.

    `source` says where it comes from; `key` is what to change.
    """
    remedy = _remedy_for(data)
    is_by_id = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if remedy or not is_by_id:
        raise ConfigError(
            key,
            f"the {part} part of {source} is of type {type(data).__name__}; samples are read by their id, so it must "
            f"have __len__ and __getitem__ and be no stream{remedy}",
        )
    try:
        length = len(data)
    except Exception as error:
        # Anything: it is other people's code.
        message = f"the {part} part of {source} has no length: {type(error).__name__}: {error}"
        raise config_error(key, message, error) from error
    if length == 0:
        raise DataError(
            f"the {part} part of {source} holds no samples; {key} must give at least one"
        )


def _remedy_for(data: Any) -> str:
    """What to give instead of something that is no data set, though it may look like one; "" for a data set."""
    advice = way_out(data)
    if advice:
        return f". {advice}"
    if isinstance(data, Mapping):
        names = ", ".join(repr(name) for name in list(data)[:4])
        return f". Give one of its entries ({names}) as each part"
    if isinstance(data, tuple) and any(hasattr(part, "shape") for part in data):
        return ". Give torch.utils.data.TensorDataset(inputs, targets)"
    if callable(data) and not hasattr(data, "__getitem__"):
        return ". Give what it returns, by calling it"
    if isinstance(data, str | bytes | Path):
        return ". Give a data set, or name one in data.name with its data.root"
    return ""
