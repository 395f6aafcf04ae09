"""Boxes and classes of pixels drawn over images: float `(3, H, W)` in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.reporting.figures.style import BLUE, VERMILION

# Okabe and Ito's palette (2008), the two that stand for true and predicted left out.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#999999")
LEAST_SIDE = 160  # pixels of a picture, so that lines are thin beside it
OPACITY = 0.75  # of a class's colour, below which the image is to be seen
TRUE, PREDICTED = BLUE, VERMILION


def as_colour(image: Tensor) -> Tensor:
    """An image `(C, H, W)` in [0, 1] as `(3, H, W)`; of other than three channels the first."""
    image = image.detach().float().cpu()
    image = image.nan_to_num().clamp(0, 1)
    if len(image) == 3:
        return image
    return image[:1].expand(3, -1, -1)


def enlarge(image: Tensor) -> tuple[Tensor, int]:
    """The image in whole multiples of its pixels, at least 160 on the longer side, and the multiple."""
    longer_side = max(image.shape[-2:])
    factor = max(1, math.ceil(LEAST_SIDE / longer_side))
    enlarged = image.repeat_interleave(factor, -2)
    enlarged = enlarged.repeat_interleave(factor, -1)
    return enlarged, factor


def with_boxes(image: Tensor, groups: Sequence[tuple[Tensor, str]]) -> Tensor:
    """The image, enlarged, with each group of boxes `(K, 4)` in its colour."""
    picture, factor = enlarge(as_colour(image))
    picture = picture.clone()
    _, height, width = picture.shape
    ends = torch.tensor([width, height, width, height], dtype=torch.int32)
    for boxes, colour in groups:
        corners = (boxes.cpu() * factor).round().int()
        # A model may answer boxes that reach beyond the image.
        within = corners.clamp(min=0).minimum(ends)
        rgb = _rgb(colour)
        for box in within.tolist():
            _draw_box(picture, box, rgb)
    return picture


def _draw_box(picture: Tensor, box: Sequence[int], colour: Tensor) -> None:
    """A frame two pixels wide."""
    left, top, right, bottom = box
    height, width = slice(top, bottom), slice(left, right)
    # From 0 on at least: a negative start would count from the picture's other end.
    bottom_line = slice(max(bottom - 2, 0), bottom)
    right_line = slice(max(right - 2, 0), right)
    colour = colour[:, None, None]
    picture[:, top : top + 2, width] = colour
    picture[:, bottom_line, width] = colour
    picture[:, height, left : left + 2] = colour
    picture[:, height, right_line] = colour


def with_classes(image: Tensor, classes: Tensor, shows_first: bool) -> Tensor:
    """The image with the class of each pixel `(H, W)` in its colour; class 0 has none unless `shows_first`."""
    picture = as_colour(image).clone()
    if classes.shape != picture.shape[-2:]:
        # A model may answer at another size than that of its input. Of the nearest pixel: classes have no mean.
        batch = classes.float()[None, None]
        resized = F.interpolate(batch, tuple(picture.shape[-2:]))
        classes = resized[0, 0].long()
    first = 0 if shows_first else 1
    for class_id in torch.unique(classes).tolist():
        if class_id == 0 and not shows_first:
            continue
        index = (class_id - first) % len(PALETTE)
        colour = _rgb(PALETTE[index])
        inside = classes == class_id
        below = (1 - OPACITY) * picture[:, inside]
        picture[:, inside] = below + OPACITY * colour[:, None]
    return picture


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Two pictures of one size with white between them."""
    _, height, width = left.shape
    gap = torch.ones(3, height, max(1, width // 24))
    return torch.cat([left, gap, right], 2)


def on_one_size(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures of any sizes as `(N, 3, H, W)`, with white beside the smaller ones."""
    height = max(picture.shape[1] for picture in pictures)
    width = max(picture.shape[2] for picture in pictures)
    canvases = torch.ones(len(pictures), 3, height, width)
    for canvas, picture in zip(canvases, pictures, strict=True):
        _, picture_height, picture_width = picture.shape
        canvas[:, :picture_height, :picture_width] = picture
    return canvases


def _rgb(colour: str) -> Tensor:
    from matplotlib.colors import to_rgb

    return torch.tensor(to_rgb(colour))
