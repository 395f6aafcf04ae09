"""CUDA graphs behind a small interface: work is recorded once, and then launched as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from trainer.process.device import default_generator

T = TypeVar("T")


class Recorder(Protocol):
    """Records work on a device."""

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """What `work` returns, and a function that does the same work again on the same tensors.

        Its results are written into the tensors returned here, whose values count from the first replay on. Raises
        whatever `work` raises, and `RuntimeError` for work that cannot be recorded.
        """


class CudaRecorder:
    """Records by `torch.cuda.graph`. What it records shares memory, so one replay ends before the next begins."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """As `Recorder` says. Draws from the device's default generator follow from its seed at each replay."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self._device)
        generator = default_generator(self._device)
        assert generator is not None
        untouched = generator.clone_state()
        try:
            # Other threads, which load samples and write files, go on using the device.
            with torch.cuda.graph(
                graph, pool=self._pool, capture_error_mode="thread_local"
            ):
                result = work()
        except BaseException:
            # torch leaves its own stream current, and a generator that believes to be recorded.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(untouched)
            raise
        self._pool = graph.pool()
        return result, graph.replay


# By kind of device.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}


def recorder_for(device: torch.device) -> Recorder | None:
    """What records work on `device`; None for a kind of device without CUDA graphs."""
    make_recorder = RECORDERS.get(device.type)
    return None if make_recorder is None else make_recorder(device)
