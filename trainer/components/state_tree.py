"""Any nesting of tensors and plain values as tensors by name and a tree that JSON knows, and back.

{"$tensor": name}           a tensor, under that name; with "cpu": true, one that stays on the CPU; with "stride", one
                            of another memory format, on which the bits of a product depend
{"$parameter": name}        a parameter of the model itself, of which nothing is stored
{"$tuple": […]}  {"$deque": […], "length": n}  {"$items": [[key, value], …]}    what JSON has no word for
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TENSOR = "$tensor"
PARAMETER = "$parameter"
TUPLE = "$tuple"
DEQUE = "$deque"
ITEMS = "$items"


class UnsupportedValueError(Exception):
    """A value of a kind that cannot be stored; its text names its place and the kind."""


class Encoder:
    """Encodes values; `tensors` collects copies of their tensors. `names` has the model's parameters by id."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names = names

    def encode(self, value: Any, name: str) -> Any:
        """The tree of `value`; its tensors are stored under names that begin with `name`.

        Raises `UnsupportedValueError`.
        """
        if isinstance(value, Tensor):
            return self._encode_tensor(value, name)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return self._encode_mapping(value, name)
        if isinstance(value, list):
            return self._encode_items(value, name)
        if isinstance(value, tuple):
            return {TUPLE: self._encode_items(value, name)}
        if isinstance(value, deque):
            items = self._encode_items(value, name)
            return {DEQUE: items, "length": value.maxlen}
        if hasattr(value, "item") and hasattr(value, "dtype"):  # a number of NumPy
            return self.encode(value.item(), name)
        raise UnsupportedValueError(f'"{name}" is of type {type(value).__qualname__}')

    def _encode_items(self, values: Any, name: str) -> list[Any]:
        trees = []
        for index, value in enumerate(values):
            trees.append(self.encode(value, f"{name}/{index}"))
        return trees

    def _encode_tensor(self, tensor: Tensor, name: str) -> Any:
        if id(tensor) in self._names:
            return {PARAMETER: self._names[id(tensor)]}
        if tensor.layout != torch.strided:
            raise UnsupportedValueError(f'"{name}" is a tensor of {tensor.layout}')
        # A copy: safetensors refuses tensors that share memory.
        self.tensors[name] = tensor.detach().clone().contiguous()
        return describe_tensor(tensor, name)

    def _encode_mapping(self, values: Mapping[Any, Any], name: str) -> Any:
        if all(map(_is_plain_key, values)):
            trees = {}
            for key, value in values.items():
                trees[key] = self.encode(value, f"{name}/{key}")
            return trees
        pairs = []
        for index, (key, value) in enumerate(values.items()):
            tree = self.encode(value, f"{name}/{index}")
            key_tree = self.encode(key, f"{name}/key {index}")
            pairs.append([key_tree, tree])
        return {ITEMS: pairs}


def _is_plain_key(key: Any) -> bool:
    """False for what JSON would turn into text, and for text that looks like a word of ours."""
    return isinstance(key, str) and not key.startswith("$")


class Decoder:
    """Decodes what an `Encoder` made, for a model with these parameters by name, on `device`."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
    ) -> None:
        self._tensors = tensors
        self._parameters = parameters
        self._device = device
        self.used: set[str] = set()  # names of tensors that were decoded

    def decode(self, tree: Any) -> Any:
        """The value of a tree. Raises `KeyError` for a tensor or parameter that is not there."""
        if isinstance(tree, list):
            return [self.decode(item) for item in tree]
        if not isinstance(tree, Mapping):
            return tree
        if TENSOR in tree:
            return self._decode_tensor(tree)
        if PARAMETER in tree:
            return self._parameters[tree[PARAMETER]]
        if TUPLE in tree:
            return tuple(self.decode(tree[TUPLE]))
        if DEQUE in tree:
            return deque(self.decode(tree[DEQUE]), maxlen=tree["length"])
        if ITEMS in tree:
            items = {}
            for key, item in tree[ITEMS]:
                items[self.decode(key)] = self.decode(item)
            return items
        return {key: self.decode(item) for key, item in tree.items()}

    def _decode_tensor(self, tree: Mapping[str, Any]) -> Tensor:
        name = tree[TENSOR]
        self.used.add(name)
        value = self._tensors[name]
        device = torch.device("cpu") if tree.get("cpu") else self._device
        # A run that stopped on a CPU may go on on a GPU, where all but counters is wanted.
        if device.type == "cpu" and value.dim() > 0:
            device = self._device
        if "stride" not in tree:
            return value.to(device, copy=True)
        copy = torch.empty_strided(
            value.shape, tree["stride"], dtype=value.dtype, device=device
        )
        return copy.copy_(value)


def describe_tensor(tensor: Tensor, name: str) -> dict[str, Any]:
    """The node of a tensor that is stored, contiguous, under `name`."""
    node: dict[str, Any] = {TENSOR: name}
    if tensor.device.type == "cpu":
        node["cpu"] = True
    # A copy has the same strides unless the tensor's elements overlap or have gaps.
    copy_stride = torch.empty_like(tensor, device="meta").stride()
    if not tensor.is_contiguous() and copy_stride == tensor.stride():
        node["stride"] = list(tensor.stride())
    return node
