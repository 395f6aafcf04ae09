"""Decoded images as one batch whose channels stay together in memory, as they lie in each image.

Torch's `default_collate` puts them apart, a byte at a time. That takes three times as long as to copy rows of pixels,
and a device does it on its way to floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from trainer.data.fast_crop import is_decoded_image


def stack_decoded(images: Sequence[Any]) -> Tensor | None:
    """The batch, uint8 `(N, 3, H, W)` in memory as `torch.channels_last`; None for other than such images of one size.

    Shared memory in a loader process, as with `default_collate`.
    """
    if not all(map(is_decoded_image, images)):
        return None
    if len({image.shape for image in images}) > 1:
        return None
    batch: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
    return batch.permute(0, 3, 1, 2)
