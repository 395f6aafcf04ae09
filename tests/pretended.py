"""A CUDA device of fake tensors: shapes, dtypes and devices as on a GPU, and no numbers.

Whatever makes the host wait for the device (`.item()`, `.tolist()`, `bool(tensor)`, `nonzero`, a boolean mask) needs a
number, so on a fake tensor it raises. Copies to the host are seen by `DeviceLog`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.inspection.autograd_chain import post_order

CUDA = torch.device("cuda", 0)


class DeviceLog(TorchDispatchMode):
    """Copies between host and device, and the names of operations on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies = 0
        self.blocking_copies: list[tuple[int, ...]] = []  # shapes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(function)
        # Torch gives it no shapes-only version; it changes tensors in place.
        if name.startswith("aten._fused_sgd_"):
            self.operations[name] += 1
            return None
        result = function(*args, **kwargs)
        tensors = [
            leaf
            for leaf in tree_leaves((args, kwargs, result))
            if isinstance(leaf, Tensor)
        ]
        devices = {tensor.device.type for tensor in tensors}
        if "cuda" in devices:
            self.operations[name] += 1
        if devices >= {"cpu", "cuda"} and name.startswith(
            ("aten._to_copy", "aten.copy_")
        ):
            self.copies += 1
            is_async = kwargs.get("non_blocking") or (
                name.startswith("aten.copy_") and args[2:] == (True,)
            )
            if not is_async:
                self.blocking_copies.append(tuple(tensors[0].shape))
        return result


class Stream:
    """Stands for every stream: what runs when is not pretended."""

    def __init__(self, *_: Any) -> None: ...

    def record_event(self) -> Stream:
        return self

    def wait_event(self, _: Stream) -> None: ...


class StandInGenerator:
    """Stands for the device's generator."""

    def manual_seed(self, seed: int) -> None: ...

    def get_state(self) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, _: Tensor) -> None: ...


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Within it, tensors and modules can be on `CUDA`, and a backward can be run."""
    replacements: dict[str, Any] = {
        "torch.nn.Module.to": _move,
        "torch.Tensor.backward": lambda root, gradient=None: run_backward(
            root, gradient
        ),
        "torch.autograd.backward": lambda root, gradient=None: run_backward(
            root, gradient
        ),
        "torch.Tensor.pin_memory": lambda tensor: tensor,
        "torch.Tensor.record_stream": lambda tensor, stream: None,
        "torch.cuda.default_generators": (StandInGenerator(),),
        "torch.cuda.Stream": Stream,
        "torch.cuda.stream": lambda _: nullcontext(),
        "torch.cuda.current_stream": Stream,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    }
    with ExitStack() as stack:
        for target, replacement in replacements.items():
            stack.enter_context(patch(target, replacement))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _move(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to`, which would set the data of a tensor on the host to one on the device: of fakes it cannot."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)

    def moved(tensor: Tensor) -> Tensor:
        kind = (
            dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        )
        # Of the same kind, not a copy: what was made from a Python number would be copied in earnest.
        result = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=kind, device=device or tensor.device
        )
        if memory_format is not None and tensor.dim() == 4:
            result = result.contiguous(memory_format=memory_format)
        return result

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(
                    moved(parameter.detach()), parameter.requires_grad
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = moved(buffer)
    return module


@torch.no_grad()
def run_backward(root: Tensor, gradient: Tensor | None = None) -> None:
    """`root.backward(gradient)`, one autograd node after the other: torch's engine has no thread for this device."""
    assert root.grad_fn is not None
    arrived: dict[Any, list[Tensor | None]] = {
        root.grad_fn: [torch.ones_like(root) if gradient is None else gradient]
    }
    for node in reversed(post_order(root.grad_fn)):
        incoming = arrived.pop(node, None)
        if incoming is None or all(part is None for part in incoming):
            continue
        if hasattr(node, "variable"):
            _accumulate(node.variable, incoming[0])
            continue
        outgoing = node(*incoming)
        outgoing = outgoing if isinstance(outgoing, tuple) else (outgoing,)
        for (successor, slot), part in zip(node.next_functions, outgoing, strict=False):
            if successor is None or part is None:
                continue
            slots = arrived.setdefault(successor, [None] * _number_of_inputs(successor))
            slots[slot] = part if slots[slot] is None else slots[slot] + part


def _number_of_inputs(node: Any) -> int:
    return 1 if hasattr(node, "variable") else len(node._input_metadata)


def _accumulate(leaf: Tensor, gradient: Tensor | None) -> None:
    assert gradient is not None
    gradient = gradient.sum_to_size(leaf.shape).to(leaf.dtype)
    leaf.grad = gradient.detach() if leaf.grad is None else leaf.grad.add_(gradient)
