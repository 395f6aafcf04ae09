"""CUDA graphs on the CPU: the operations of some work are noted, and done again on the same tensors.

As with a graph, a replay runs none of the Python around them, reads its inputs where they stood, writes each result
where the first one stands, and draws from the default generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.process.cuda_graph import RECORDERS

T = TypeVar("T")


class Operation(NamedTuple):
    function: Any
    arguments: Any
    named: Any
    results: list[Tensor]


class Recording(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        named = kwargs or {}
        result = function(*args, **named)
        self.operations.append(Operation(function, args, named, tensors_of(result)))
        return result


class GraphsOnCpu:
    """Records on the CPU. `spoil` changes the results of an operation, by its name and number, in each replay."""

    def __init__(
        self, spoil: Callable[[str, list[Tensor]], None] | None = None
    ) -> None:
        self.recordings = 0
        self.replays = 0
        self._spoil = spoil

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """As `trainer.process.cuda_graph.Recorder` says."""
        with Recording() as recording:
            results = work()
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for operation in recording.operations:
                    self._repeat(operation)

        return results, replay

    def _repeat(self, operation: Operation) -> None:
        function, arguments, named, results = operation
        inputs = tensors_of((arguments, named))
        memory = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        is_written = function._schema.is_mutable
        is_view = not is_written and any(
            result.untyped_storage().data_ptr() in memory for result in results
        )
        if is_view:
            return
        # Kernels leave no mark on what they write.
        with _unsafe_preserve_version_counter(tuple(inputs)):
            again = tensors_of(function(*arguments, **named))
        if self._spoil is not None:
            self._spoil(str(function), again)
        for kept, new in zip(results, again, strict=True):
            if kept.data_ptr() != new.data_ptr():
                kept.copy_(new)


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def graphs_on_cpu(recorder: GraphsOnCpu | None = None) -> Iterator[GraphsOnCpu]:
    """Within it, a CPU is a device with CUDA graphs."""
    recorder = recorder or GraphsOnCpu()
    with patch.dict(RECORDERS, cpu=lambda device: recorder):
        yield recorder
