"""What an object of other people's class was made with, read off the object."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


def constructor_arguments(made: object) -> dict[str, Any]:
    """The arguments of the constructor, read from the attributes of their names; defaults are left out.

    Tensors come as lists, as a config holds them.
    """
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(made)).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        value = getattr(made, name, parameter.default)
        if isinstance(value, Tensor):
            value = value.tolist()
        if value != parameter.default:
            arguments[name] = value
    return arguments
