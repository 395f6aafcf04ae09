"""Made-up images of shapes, for every kind of task: where they are, which pixels are theirs, which kinds there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.exact.seeding import numpy_generator

KINDS = ("square", "disc", "cross")
# Of classes: the background and the kinds. A shape's number in a mask is its class, plus a multiple of this.
CLASSES = 1 + len(KINDS)
TARGETS = ("boxes", "mask", "labels", "area")
MOST_SHAPES = 3
LEAST_RADIUS = 5  # pixels
NOISE = 40  # of 255

Pixels = npt.NDArray[np.uint8]


class Shapes:
    """Noisy images of one to three shapes, each image a function of its id and part. No image is stored.

    Args:
        target: what a sample's target is. `boxes`: a dict of `boxes` `(K, 4)` and `labels` `(K,)`, where 0 is the
            background. `mask`: the class of each pixel, int64 `(H, W)`. `labels`: for each kind whether the image has
            it, float `(3,)`. `area`: the share of the pixels that are a shape's, float `(1,)`.
        vary: sides differ from `image_size` by up to this share, from image to image.

    An image is uint8 `(3, H, W)`.
    """

    def __init__(
        self, part: str, size: int, image_size: int, target: str, vary: float = 0.0
    ) -> None:
        self.part = part
        self.size = size
        self.image_size = image_size
        self.target = target
        self.vary = vary

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        draw = numpy_generator(0, f"shapes/{self.part}", index)
        # In this order, and even where nothing varies: a sample is what its generator gives, draw by draw.
        factors = draw.uniform(1 - self.vary, 1 + self.vary, size=2)
        height, width = (self.image_size * factors).astype(int)
        pixels = draw.integers(NOISE, size=(3, height, width), dtype=np.uint8)
        mask = np.zeros((height, width), dtype=np.int64)
        count = draw.integers(1, MOST_SHAPES + 1)
        for _ in range(count):
            _draw_shape(draw, pixels, mask)
        return torch.from_numpy(pixels), self._target(mask)

    def _target(self, mask: npt.NDArray[np.int64]) -> Any:
        """The sample's target, from a mask that tells single shapes apart (see `_draw_shape`)."""
        classes = mask % CLASSES
        if self.target == "mask":
            return torch.from_numpy(classes)
        if self.target == "labels":
            present = np.isin(np.arange(1, CLASSES), classes)
            return torch.from_numpy(present).float()
        if self.target == "area":
            share = (classes > 0).mean()
            return torch.tensor([share], dtype=torch.float32)
        boxes = []
        labels = []
        for number in np.unique(mask).tolist():
            if number == 0:  # the background
                continue
            boxes.append(_box_of(mask == number))
            labels.append(number % CLASSES)
        return {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}


def class_names(target: str) -> list[str] | None:
    """The names of the classes that a target tells apart, by id."""
    if target == "area":
        return None
    if target == "labels":
        return list(KINDS)
    return ["background", *KINDS]


def check_target(target: str) -> None:
    if target not in TARGETS:
        known = ", ".join(TARGETS)
        raise ConfigError("data.target", f"{target} is not one of {known}")


def _draw_shape(
    draw: np.random.Generator, pixels: Pixels, mask: npt.NDArray[np.int64]
) -> None:
    """Draw one shape over the others, unless it would hide too much of them to be told.

    Its pixels in the mask get a number of its own: `CLASSES` times how many there are, plus 1, 2 or 3 for its kind.
    """
    height, width = mask.shape
    fifth = min(height, width) // 5
    largest = max(LEAST_RADIUS + 1, fifth)
    radius = int(draw.integers(LEAST_RADIUS, largest + 1))
    kind = int(draw.integers(len(KINDS)))
    x = int(draw.integers(radius, width - radius))
    y = int(draw.integers(radius, height - radius))
    rows, columns = np.ogrid[:height, :width]
    down = np.abs(rows - y)
    across = np.abs(columns - x)
    around = np.maximum(down, across) <= radius
    if (mask[around] > 0).any():
        return
    inside = around
    if KINDS[kind] == "disc":
        inside = down**2 + across**2 <= radius**2
    elif KINDS[kind] == "cross":
        arm = radius // 3
        inside = around & (np.minimum(down, across) <= arm)
    colour = draw.integers(120, 256, size=3, dtype=np.uint8)
    pixels[:, inside] = colour[:, None] - pixels[:, inside]
    last_number = int(mask.max())
    shapes = last_number // CLASSES + 1
    mask[inside] = shapes * CLASSES + 1 + kind


def _box_of(inside: npt.NDArray[np.bool_]) -> list[float]:
    """The box around some pixels, (x1, y1, x2, y2): from the first pixel's edge to that past the last."""
    rows = np.flatnonzero(inside.any(1))
    columns = np.flatnonzero(inside.any(0))
    return [
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] + 1),
        float(rows[-1] + 1),
    ]
