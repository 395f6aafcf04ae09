"""The state of any object that has `state_dict()`, as two files without pickle: tensors, and the rest as JSON.

    ema.safetensors   every tensor, under its dotted path: "averaged.0.weight"
    ema.json          the same nesting, with {"$tensor": "averaged.0.weight"} where a tensor was

Values come back with their exact type: tuples as tuples, whole-number keys as whole numbers, infinities and NaN as
such. Tensors come back bit for bit, on the CPU; a `Parameter` comes back as a plain tensor, an `OrderedDict` as a dict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import LockstepError
from trainer.exact.shards import is_shard
from trainer.storage.host_copies import host_copy

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Files that every checkpoint has.
RESERVED_NAMES = {"model", "optimizer", "state", "manifest"}
RESERVED_TENSOR = "__metadata__"  # safetensors' own entry

# JSON knows neither tensors nor tuples, and only text as keys: these stand for them.
TENSOR, TUPLE, ITEMS = "$tensor", "$tuple", "$items"

DTYPES = {
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
}
ALLOWED = (
    "tensors, numbers, text, True, False, None, and lists, tuples and dicts of these"
)


def check_name(name: str) -> None:
    """Raise `LockstepError` unless `name` can name the files of an object's state."""
    if not NAME.fullmatch(name):
        raise LockstepError(
            f'"{name}" cannot name files in a checkpoint; use letters, digits, dots, dashes and underscores, '
            f"beginning with a letter or a digit"
        )
    if name.lower() in RESERVED_NAMES:
        raise LockstepError(
            f'"{name}" names a file that every checkpoint has; choose another name'
        )


def load_state(directory: Path, name: str) -> dict[Any, Any]:
    """A state whose files `Snapshot.add_state` made.

    Raises `OSError`, `ValueError`, `KeyError` or `SafetensorError` on damaged files.
    """
    tensors = load_file(directory / f"{name}.safetensors")
    tree = json.loads((directory / f"{name}.json").read_text())
    return join_state(tree, tensors)


def split_state(
    name: str, state: Mapping[Any, Any], *, copies: bool = True
) -> tuple[Any, dict[str, Tensor]]:
    """A state as values that JSON knows, and copies of its tensors on the CPU.

    Without `copies` the tensors are the state's own, wherever they are. Raises `LockstepError`, naming the object and
    the key, if `state` holds anything but `ALLOWED`.
    """
    encoder = _Encoder(name, copies=copies)
    if not isinstance(state, Mapping):
        raise encoder.unsupported(
            "", _kind(state), "dicts: what `state_dict()` returns"
        )
    return encoder.encode(state, ""), encoder.tensors


def join_state(tree: Any, tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
    """The state that `split_state` took apart."""
    return dict(_decode(tree, tensors))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. A failure of the system is an `OSError` that names the file."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path)
        # safetensors makes files that nobody else may read; this one has the mode of any new file.
        path.chmod(mode)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(None, str(error), str(path)) from error


class _Encoder:
    """Turns a state into values that JSON knows, and collects the tensors on the way."""

    def __init__(self, name: str, *, copies: bool) -> None:
        self.name = name
        self.copies = copies
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return {TENSOR: self._add_tensor(value, path)}
        if isinstance(value, Mapping):
            return self._encode_mapping(value, path)
        if isinstance(value, list):
            return self._encode_sequence(value, path)
        if isinstance(value, tuple):
            return {TUPLE: self._encode_sequence(value, path)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise self.unsupported(path, _kind(value))

    def _encode_sequence(
        self, values: list[Any] | tuple[Any, ...], path: str
    ) -> list[Any]:
        return [
            self.encode(value, _join(path, index)) for index, value in enumerate(values)
        ]

    def _encode_mapping(self, mapping: Mapping[Any, Any], path: str) -> dict[str, Any]:
        items = []
        for key, value in mapping.items():
            if not isinstance(key, str | int):
                raise self.unsupported(
                    path,
                    f"a dict with the key {key!r}, which is neither text nor a whole number",
                )
            items.append([key, self.encode(value, _join(path, key))])
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {ITEMS: items}

    def _add_tensor(self, tensor: Tensor, path: str) -> str:
        if is_shard(tensor):
            kind = "a part of a tensor, as train.parallel=fsdp shares it out"
            raise self.unsupported(path, kind, "whole tensors, tensor.full_tensor()")
        if (
            tensor.layout != torch.strided
            or tensor.dtype not in DTYPES
            or tensor.is_meta
        ):
            kind = f"a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise self.unsupported(path, kind, "dense tensors of the usual dtypes")
        key = path
        # {"a.b": x, "a": {"b": y}} has one path twice.
        while key in self.tensors or key == RESERVED_TENSOR:
            key += "'"
        self.tensors[key] = host_copy(tensor) if self.copies else tensor.detach()
        return key

    def unsupported(
        self, path: str, kind: str, allowed: str = ALLOWED
    ) -> LockstepError:
        where = f'"{path}" is' if path else "it is"
        return LockstepError(
            f'the state of "{self.name}" cannot be saved: {where} {kind}; a checkpoint holds {allowed}'
        )


def _kind(value: object) -> str:
    kind = type(value)
    return f"a {kind.__module__}.{kind.__qualname__}"


def _join(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if TUPLE in value:
        return tuple(_decode(value[TUPLE], tensors))
    if ITEMS in value:
        return {key: _decode(item, tensors) for key, item in value[ITEMS]}
    return {key: _decode(item, tensors) for key, item in value.items()}
