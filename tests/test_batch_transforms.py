"""Transforms of whole batches: against torchvision's functions image by image, in any split of the batch."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from trainer.data.batch_transforms import several_sizes
from trainer.data.batch_transforms.base import BatchTransforms
from trainer.data.batch_transforms.boxes import ATTEMPTS, STEPS
from trainer.data.batch_transforms.build import (
    BATCH_TRANSFORMS,
    build_batch_transforms,
)
from trainer.data.batches import Source
from trainer.data.image_list import ImageList, pack
from trainer.errors import ConfigError
from trainer.exact.counter_draws import RANGE
from trainer.exact.seeding import key, mix_key

SEED, EPOCH = 3, 2
tv: Any = functional
CPU = torch.device("cpu")
HEIGHT, WIDTH = 24, 17
EXAMPLES: list[dict[str, Any]] = [
    {"name": "RandomHorizontalFlip"},
    {"name": "RandomVerticalFlip", "p": 0.3},
    {"name": "RandomCrop", "size": 15},
    {"name": "RandomCrop", "size": [24, 20], "padding": 4, "fill": [1, 2, 3]},
    {"name": "RandomCrop", "size": 16, "padding": 3, "padding_mode": "reflect"},
    {"name": "RandomCrop", "size": 16, "padding": 3, "padding_mode": "edge"},
    {"name": "RandomResizedCrop", "size": [12, 19]},
    {"name": "RandomResizedCrop", "size": 5, "scale": [0.5, 1], "ratio": [3, 4]},
    {"name": "Resize", "size": [30, 11]},
    {"name": "RandomErasing", "p": 0.8, "value": [9, 8, 7]},
    {"name": "ColorJitter", "brightness": 0.4, "contrast": 0.6, "saturation": [0, 3]},
    {"name": "ColorJitter", "hue": 0.5},
    {"name": "ColorJitter", "brightness": 0.3, "saturation": 0.8, "hue": [-0.1, 0.4]},
    {"name": "RandomGrayscale", "p": 0.5},
]


class Loses:
    """A user's own, which does not give back all images."""

    draws = 0

    def __init__(self, all: bool = False) -> None:
        self.all = all

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor | None:
        return None if self.all else images[1:]


def images(count: int = 40, channels: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    shape = (count, channels, HEIGHT, WIDTH)
    return torch.randint(256, shape, generator=draw).to(torch.uint8)


def source(ids: Tensor, occurrences: Tensor | None = None) -> Source:
    return Source(EPOCH, ids, occurrences)


def transforms(*items: dict[str, Any]) -> BatchTransforms:
    built = build_batch_transforms(list(items), seed=SEED, purpose="train", device=CPU)
    assert built is not None
    return built


def draws_of(item: dict[str, Any], sample: int) -> list[int]:
    """The draws of a sample for a list of this transform alone, by plain Python."""
    base = key(SEED, f"train batch transform {item['name']}", 0)
    of_sample = mix_key(mix_key(base, EPOCH, 0), sample, 0)
    arguments = {name: value for name, value in item.items() if name != "name"}
    count = BATCH_TRANSFORMS[item["name"]](**arguments).draws
    return [mix_key(of_sample, number, 0) >> 32 for number in range(count)]


def below(draw: int, bound: int) -> int:
    return draw * bound >> 32


# ------------------------------------------------ image by image, by torchvision


def flipped(image: Tensor, draws: list[int], *, p: float = 0.5) -> Any:
    return tv.horizontal_flip(image) if draws[0] < round(p * RANGE) else image


def flipped_down(image: Tensor, draws: list[int], *, p: float = 0.5) -> Any:
    return tv.vertical_flip(image) if draws[0] < round(p * RANGE) else image


def cropped(
    image: Tensor,
    draws: list[int],
    *,
    size: Any,
    padding: int = 0,
    fill: Any = 0,
    padding_mode: str = "constant",
) -> Any:
    if padding:
        image = tv.pad(image, [padding], fill=fill, padding_mode=padding_mode)
    height, width = size if isinstance(size, list) else (size, size)
    top = below(draws[0], image.shape[1] - height + 1)
    left = below(draws[1], image.shape[2] - width + 1)
    return tv.crop(image, top, left, height, width)


def box_of(
    draws: list[int], scale: Any, ratio: Any, inside: bool
) -> tuple[int, int, int, int] | None:
    """Top, left, height and width, by torchvision's formula; None where no attempt fits."""
    limit = 1 if inside else 0
    for attempt in range(ATTEMPTS):
        share = (below(draws[attempt], STEPS) + 0.5) / STEPS
        area = (scale[0] + (scale[1] - scale[0]) * share) * HEIGHT * WIDTH
        share = (below(draws[ATTEMPTS + attempt], STEPS) + 0.5) / STEPS
        low, high = map(math.log, ratio)
        aspect = math.exp(low + (high - low) * share)
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= WIDTH - limit and 0 < height <= HEIGHT - limit:
            top = below(draws[-2], HEIGHT - height + 1)
            left = below(draws[-1], WIDTH - width + 1)
            return top, left, height, width
    return None


def resized(
    image: Tensor,
    draws: list[int],
    *,
    size: Any,
    scale: Any = (0.08, 1.0),
    ratio: Any = (3 / 4, 4 / 3),
) -> Any:
    box = box_of(draws, scale, ratio, inside=False)
    if box is None:
        # As wide as the image, and as high as the least or the largest ratio has it.
        height = round(WIDTH / min(max(WIDTH / HEIGHT, ratio[0]), ratio[1]))
        box = (HEIGHT - height) // 2, 0, height, WIDTH
    size = size if isinstance(size, list) else [size, size]
    part = tv.crop(image, *box)
    return tv.resize(part.double(), size, antialias=True).round().clamp(0, 255).byte()


def whole_resized(image: Tensor, draws: list[int], *, size: Any) -> Any:
    resized_image = tv.resize(image.double(), size, antialias=True)
    return resized_image.round().clamp(0, 255).byte()


def erased(
    image: Tensor,
    draws: list[int],
    *,
    p: float,
    value: Any,
    scale: Any = (0.02, 0.33),
    ratio: Any = (0.3, 3.3),
) -> Any:
    box = box_of(draws[:-1], scale, (1 / ratio[1], 1 / ratio[0]), inside=True)
    if box is None or draws[-1] >= round(p * RANGE):
        return image
    fill = torch.tensor(value, dtype=torch.uint8).view(-1, 1, 1)
    return tv.erase(image, *box, fill)


def recolored(
    image: Tensor,
    draws: list[int],
    *,
    brightness: Any = 0,
    contrast: Any = 0,
    saturation: Any = 0,
    hue: Any = 0,
) -> Any:
    factors = []
    for amount, draw in zip((brightness, contrast, saturation), draws, strict=False):
        low, high = amount if isinstance(amount, list) else (1 - amount, 1 + amount)
        factors.append(low + (high - low) * draw / RANGE)
    changes = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation]
    if hue:
        low, high = hue if isinstance(hue, list) else (-hue, hue)
        factors.append(low + (high - low) * draws[4] / RANGE)
        changes.append(tv.adjust_hue)
    orders = list(permutations(range(len(changes))))
    for kind in orders[below(draws[3], len(orders))]:
        image = changes[kind](image, factors[kind])
    return image


def grayed(image: Tensor, draws: list[int], *, p: float) -> Any:
    return tv.rgb_to_grayscale(image, 3) if draws[0] < round(p * RANGE) else image


BY_TORCHVISION = {
    "RandomHorizontalFlip": flipped,
    "RandomVerticalFlip": flipped_down,
    "RandomCrop": cropped,
    "RandomResizedCrop": resized,
    "Resize": whole_resized,
    "RandomErasing": erased,
    "ColorJitter": recolored,
    "RandomGrayscale": grayed,
}
# Levels of 255: whole numbers are rounded elsewhere than torchvision's.
TOLERANCE = {
    "RandomResizedCrop": 1,
    "Resize": 1,
    "ColorJitter": 6,
    "RandomGrayscale": 1,
}


@pytest.mark.parametrize("item", EXAMPLES, ids=str)
def test_as_torchvision_changes_each_image_with_the_same_draws(
    item: dict[str, Any],
) -> None:
    batch = images()
    ids = torch.arange(len(batch)) * 7919 + 5
    changed = transforms(item)(batch, source(ids))
    arguments = {name: value for name, value in item.items() if name != "name"}
    names = set()
    for image, mine, sample in zip(batch, changed, ids.tolist(), strict=True):
        function: Any = BY_TORCHVISION[item["name"]]
        expected = function(image, draws_of(item, sample), **arguments)
        assert mine.dtype == torch.uint8
        distance = (mine.int() - expected.int()).abs().max()
        assert distance <= TOLERANCE.get(item["name"], 0)
        names.add(mine.numpy().tobytes() == image.numpy().tobytes())
    if "p" in item:
        assert names == {True, False}  # some are changed, some are not


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_the_same_alone_and_in_any_batch(channels: int) -> None:
    items = [item for item in EXAMPLES if channels == 3 or "[" not in str(item)]
    chain = [
        items[0],
        {"name": "RandomCrop", "size": [HEIGHT, WIDTH], "padding": 2},
        {"name": "ColorJitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
        {"name": "RandomErasing"},
        {"name": "RandomResizedCrop", "size": 13},
    ]
    batch = images(channels=channels)
    ids = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[
        : len(batch)
    ]
    occurrences = torch.arange(len(batch)) % 3
    change = transforms(*chain)
    together = change(batch, source(ids, occurrences))
    for size in (1, 3, 16):
        parts = []
        for first in range(0, len(batch), size):
            part = slice(first, first + size)
            parts.append(change(batch[part], source(ids[part], occurrences[part])))
        assert torch.equal(torch.cat(parts), together)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    shuffled = change(batch[order], source(ids[order], occurrences[order]))
    assert torch.equal(shuffled, together[order])


@pytest.mark.parametrize(
    "item",
    [
        {"name": "RandomResizedCrop", "size": 14},
        # No box fits, so the middle of each is taken.
        {"name": "RandomResizedCrop", "size": 9, "scale": [0.9, 1], "ratio": [3, 4]},
        {"name": "Resize", "size": [20, 30]},
    ],
    ids=str,
)
def test_images_of_several_sizes_are_what_each_is_alone(
    item: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(2)
    sides = torch.randint(10, 70, (20, 2), generator=draw).tolist()
    batch = [images(1)[0].new_empty(3, *size).random_(generator=draw) for size in sides]
    ids = torch.arange(len(batch)) * 77
    change = transforms(item, {"name": "RandomHorizontalFlip"})
    alone = []
    for image, sample in zip(batch, ids, strict=True):
        alone.append(change(image[None], source(sample[None])))
    together = change(pack(batch).unpacked(), source(ids))
    assert torch.equal(together, torch.cat(alone))
    # A few at a time, so that large images do not need much memory at once.
    monkeypatch.setattr(several_sizes, "MOST_BYTES", 40_000)
    assert torch.equal(change(ImageList(batch), source(ids)), together)


def test_draws_are_new_in_each_epoch_and_for_each_occurrence() -> None:
    batch = images(16)
    ids = torch.zeros(16, dtype=torch.int64)
    change = transforms({"name": "RandomCrop", "size": 9})
    once = change(batch[:1].expand_as(batch), source(ids))
    assert len({image.numpy().tobytes() for image in once}) == 1
    again = change(batch[:1].expand_as(batch), source(ids, torch.arange(16)))
    assert len({image.numpy().tobytes() for image in again}) > 10
    later = change(batch[:1], Source(EPOCH + 1, ids[:1]))
    assert not torch.equal(later, once[:1])


def test_boxes_are_spread_as_torchvisions() -> None:
    """The mean share of the area, and of the middle of a box, of many."""
    item = {"name": "RandomResizedCrop", "size": 8}
    drawn = [
        box_of(draws_of(item, sample), (0.08, 1.0), (3 / 4, 4 / 3), inside=False)
        for sample in range(600)
    ]
    torch.manual_seed(0)
    theirs = [
        v2.RandomResizedCrop.make_params(
            v2.RandomResizedCrop(8), [torch.empty(3, HEIGHT, WIDTH)]
        )
        for _ in range(600)
    ]
    mine = np.array([box for box in drawn if box is not None])
    others = np.array([list(each.values()) for each in theirs])
    assert len(mine) > 550
    np.testing.assert_allclose(mine.mean(0), others.mean(0), atol=0.6)


def test_every_name_is_torchvisions_with_its_defaults() -> None:
    assert BATCH_TRANSFORMS.keys() <= vars(v2).keys()
    assert BATCH_TRANSFORMS.keys() == BY_TORCHVISION.keys()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"name": "RandomCorp"}, 'did you mean "RandomCrop"'),
        ({"name": "GaussianBlur"}, "data.train_transforms"),
        ({"name": "CutMix"}, "train.mix"),
        ({"size": 3}, "is missing"),
        ({"name": "RandomCrop"}, "size: RandomCrop needs this argument"),
        ({"name": "RandomCrop", "size": 0}, "not 0"),
        ({"name": "RandomCrop", "size": 8, "padding": -1}, "0 or more"),
        ({"name": "RandomCrop", "size": 8, "padding": [1, 2]}, "every side alike"),
        ({"name": "RandomCrop", "size": 8, "fill": "grey"}, "fill is a number"),
        ({"name": "RandomErasing", "value": "random"}, "value is a number"),
        ({"name": "RandomErasing", "scale": [0.1, 2]}, "up to 1"),
        ({"name": "RandomCrop", "size": 8, "padding_mode": "symmetric"}, "reflect"),
        ({"name": "RandomHorizontalFlip", "p": 2}, "from 0 to 1"),
        ({"name": "Resize", "size": 8}, "[height, width]"),
        ({"name": "RandomResizedCrop", "size": 8, "scale": [1, 0]}, "low ≤ high"),
        ({"name": "RandomResizedCrop", "size": 8, "scale": [2, 3]}, "larger than"),
        ({"name": "RandomErasing", "ratio": [True, True]}, "ratio is [low, high]"),
        ({"name": "ColorJitter", "hue": 0.6}, "hue is from 0 to 0.5"),
        ({"name": "ColorJitter", "brightness": -1}, "brightness"),
        ({"name": "torch.nn.Flatten"}, "docs/on-device.md"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_said_by_name(
    item: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_transforms\[0\]") as error:
        transforms(item)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("item", "batch", "message"),
    [
        ({"name": "RandomCrop", "size": 90}, images(), "smaller than 90 × 90"),
        ({"name": "RandomResizedCrop", "size": 8}, images().float(), "not float32"),
        ({"name": "RandomGrayscale"}, images(channels=2), "not 2"),
        (
            {"name": "RandomCrop", "size": 8, "padding": 1, "fill": [1, 2]},
            images(),
            "3 channels",
        ),
        ({"name": "RandomErasing"}, torch.zeros(4, 3), r"(4, 3)"),
        ({"name": "RandomErasing", "value": -1}, images(), "from 0 to 255"),
        ({"name": "RandomErasing", "value": [0, 0.5, 0]}, images(), "from 0 to 255"),
        ({"name": f"{__name__}.Loses"}, images(4), "3, 3"),
        ({"name": f"{__name__}.Loses", "all": True}, images(4), "None of 4"),
        ({"name": "RandomErasing"}, [images(1)], "a list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_images_that_do_not_fit_are_one_clear_error(
    item: dict[str, Any], batch: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_transforms: ") as error:
        transforms(item)(batch, source(torch.arange(len(batch))))
    assert message in str(error.value)
