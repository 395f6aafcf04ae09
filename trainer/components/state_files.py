"""Files of weights: what they are read as, and which of the things in them is a state dict.

Only tensors are read: no code in a file can run.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from trainer.components.unpickling import UNSUPPORTED, load_tensors
from trainer.errors import ConfigError, config_error

FILE_TYPES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".index.json")
# What a directory of weights may hold, best first.
IN_DIRECTORY = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
DEPTH = 3  # of mappings in a file that are looked into
Tensors = Mapping[str, Tensor]


def read_state_dicts(path: Path) -> dict[str, Tensors]:
    """Every state dict in a file, by its dotted key; "" for the file itself. Raises `ConfigError` if there is none."""
    if path.is_dir():
        path = _file_in(path)
    if path.name.endswith(".json"):
        return {"": _read_shards(path)}
    tree, blanks = _read(path)
    if path.suffix == ".safetensors":
        return {"": tree}
    found = dict(_state_dicts(tree, "", 0))
    if not found and blanks:
        raise ConfigError("model.weights", _explain(path, blanks[0]))
    if not found:
        raise ConfigError(
            "model.weights",
            f"{path} holds no state dict; save the model's state_dict() alone",
        )
    return found


def _state_dicts(tree: Any, name: str, depth: int) -> Iterator[tuple[str, Tensors]]:
    if not isinstance(tree, Mapping) or depth == DEPTH:
        return
    tensors = {}
    for key, value in tree.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            tensors[key] = value
    # A single tensor among other values is a counter or a loss.
    if tensors and (len(tensors) > 1 or len(tensors) == len(tree)):
        yield name, tensors
        return
    for key, value in tree.items():
        inner_name = f"{name}.{key}".lstrip(".")
        yield from _state_dicts(value, inner_name, depth + 1)


def _file_in(directory: Path) -> Path:
    for name in IN_DIRECTORY:
        if (directory / name).is_file():
            return directory / name
    raise ConfigError(
        "model.weights",
        f"{directory} is a directory without {' or '.join(IN_DIRECTORY)}; name a file",
    )


def _read_shards(path: Path) -> Tensors:
    """The tensors of all files that an index names, beside it."""
    try:
        names = json.loads(path.read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise config_error(
            "model.weights",
            f"{path} is no index of weights with a weight_map ({error})",
            error,
        ) from None
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(names)):
        tensors.update(_read(path.with_name(str(name)))[0])
    return tensors


def _read(path: Path) -> tuple[Any, list[str]]:
    """What is in a file, and the classes of it that were not read."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path), []
        return load_tensors(path)
    except pickle.UnpicklingError as error:
        match = UNSUPPORTED.search(str(error))
        raise ConfigError(
            "model.weights", _explain(path, match[1] if match else "")
        ) from None
    except Exception as error:
        # Anything: a file that is no checkpoint leads its readers anywhere.
        reason = getattr(error, "strerror", None) or str(error) or "it is empty"
        first_line = reason.splitlines()[0]
        raise config_error(
            "model.weights",
            f"{path} cannot be read ({first_line}); give a {' or '.join(FILE_TYPES)} file",
            error,
        ) from None


def _explain(path: Path, name: str) -> str:
    """Why torch reads a file only with pickle's powers, and what to do; `name` is a class in it, if one is known."""
    what = f" (a {name})" if name else ""
    advice = "save the model's state_dict() alone"
    if name:
        advice += (
            f"; if you trust the file, allow it in Python with "
            f"torch.serialization.add_safe_globals([{name}]), or load it there with weights_only=False"
        )
    return f"{path} holds more than tensors{what}, which is not read, because it could run code; {advice}"
