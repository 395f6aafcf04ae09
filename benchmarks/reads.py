"""Counts how often a program reads a tensor's value on the host, where on a GPU it would wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {
    getattr(Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "cpu", "nonzero"),
        *("__bool__", "__int__", "__float__", "__index__", "__array__"),
    )
}


class HostReads(TorchFunctionMode):
    """Within it, `count` is how many tensors' values were read by Python code.

    A tensor of whole numbers that was made on the host for the host (indices, a random permutation) counts as well:
    on a CPU the two cannot be told apart. What C++ code reads by itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))
