"""What two micro-batches have in common if one recorded graph can compute both."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.data.batches import MicroBatch


class NotRecordable(Exception):
    """Why something cannot be recorded, as part of a sentence."""


def layout_of(batch: MicroBatch, device: torch.device) -> Hashable:
    """The shapes, dtypes and strides of a batch and the structures around them. Raises `NotRecordable`.

    A graph reads tensors alone: any other value would stay what it was when the graph was recorded.
    """
    if batch.fused > 1:
        raise NotRecordable(
            "batch.fuse runs several micro-batches in one forward; set it to 1"
        )
    if batch.blend is not None:
        raise NotRecordable("the batch is mixed")
    return (
        batch.samples,
        _layout(batch.inputs, device),
        _layout(batch.targets, device),
    )


def _layout(value: Any, device: torch.device) -> Hashable:
    if type(value) is Tensor:
        if value.device != device or value.layout != torch.strided:
            raise NotRecordable(
                f"the batch has a tensor on {value.device}, {value.layout}"
            )
        return value.shape, value.dtype, value.stride()
    if isinstance(value, Mapping):
        entries = []
        for key, entry in value.items():
            entries.append((key, _layout(entry, device)))
        return type(value), tuple(entries)
    if isinstance(value, list | tuple):
        return type(value), tuple(_layout(item, device) for item in value)
    if value is None:
        return None
    raise NotRecordable(
        f"the batch has a value that is no plain tensor ({type(value).__name__})"
    )
