"""Transforms by name: the same objects as written in Python, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from trainer.data.geometry import SampleTransform
from trainer.data.transforms import build_transforms
from trainer.errors import ConfigError

KEY = "data.train_transforms"


BILINEAR, BICUBIC, NEAREST = (
    v2.InterpolationMode[name] for name in ("BILINEAR", "BICUBIC", "NEAREST")
)


def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)


def make(*items: dict[str, Any]) -> Any:
    transform = build_transforms(KEY, list(items))
    assert transform is not None
    return transform


def apply(transform: Any, image: Any, target: Any) -> tuple[Any, Any]:
    """The pair as a loader transforms it."""
    result: tuple[Any, Any] = SampleTransform(transform, KEY)(image, target)
    return result


def error(*items: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build_transforms(KEY, list(items))
    return caught.value


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal outputs from equal random state, ten times."""
    for seed in range(10):
        torch.manual_seed(seed)
        expected = theirs(image())
        torch.manual_seed(seed)
        actual = ours(image())
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_an_empty_list_is_no_transform() -> None:
    assert build_transforms(KEY, []) is None


def test_one_transform_stands_alone_and_several_are_composed_in_order() -> None:
    assert type(make({"name": "RandomHorizontalFlip"})) is v2.RandomHorizontalFlip
    ours = make(
        {"name": "RandomCrop", "size": 28, "padding": 4},
        {"name": "Resize", "size": [16, 16]},
    )
    assert type(ours) is v2.Compose
    assert_same(ours, v2.Compose([v2.RandomCrop(28, padding=4), v2.Resize((16, 16))]))


@pytest.mark.parametrize(
    ("item", "reference"),
    [
        (
            {
                "name": "RandomAffine",
                "degrees": 20,
                "translate": [0.1, 0.2],
                "scale": [0.8, 1.2],
            },
            v2.RandomAffine(20, translate=(0.1, 0.2), scale=(0.8, 1.2)),
        ),
        (
            {
                "name": "RandomResizedCrop",
                "size": [16, 20],
                "scale": [0.3, 1.0],
                "interpolation": "bicubic",
            },
            v2.RandomResizedCrop((16, 20), scale=(0.3, 1.0), interpolation=BICUBIC),
        ),
        (
            {
                "name": "RandomRotation",
                "degrees": [-30, 30],
                "fill": [1, 2, 3],
                "interpolation": "bilinear",
            },
            v2.RandomRotation((-30, 30), fill=(1, 2, 3), interpolation=BILINEAR),
        ),
        (
            {"name": "ColorJitter", "brightness": [0.5, 1.5]},
            v2.ColorJitter(brightness=(0.5, 1.5)),
        ),
        (
            {"name": "RandomErasing", "p": 1.0, "value": [1, 2, 3]},
            v2.RandomErasing(p=1.0, value=(1, 2, 3)),
        ),
        (
            {"name": "RandAugment", "interpolation": "bilinear"},
            v2.RandAugment(interpolation=BILINEAR),
        ),
        (
            {"name": "AutoAugment", "policy": "cifar10"},
            v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
        ),
        (
            {"name": "ToDtype", "dtype": "float32", "scale": True},
            v2.ToDtype(torch.float32, scale=True),
        ),
        ({"name": "torchvision.transforms.v2.RandomCrop", "size": 8}, v2.RandomCrop(8)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_what_yaml_can_write_means_what_python_would(
    item: dict[str, Any], reference: Any
) -> None:
    assert_same(make(item), reference)


def test_text_becomes_the_enum_that_older_torchvision_wants() -> None:
    transform = make({"name": "Resize", "size": 8, "interpolation": "nearest-exact"})
    assert transform.interpolation is v2.InterpolationMode.NEAREST_EXACT


def test_nested_transforms_are_built_too() -> None:
    inner = [
        {"name": "RandomCrop", "size": 30},
        {"name": "Resize", "size": 32, "interpolation": "nearest"},
    ]
    either = [{"name": "Compose", "transforms": inner}, {"name": "RandomInvert"}]
    ours = make(
        {"name": "RandomApply", "p": 0.5, "transforms": inner},
        {"name": "RandomChoice", "transforms": either},
    )

    def crop() -> list[Any]:
        return [v2.RandomCrop(30), v2.Resize(32, interpolation=NEAREST)]

    theirs = v2.Compose(
        [
            v2.RandomApply(crop(), p=0.5),
            v2.RandomChoice([v2.Compose(crop()), v2.RandomInvert()]),
        ]
    )
    assert_same(ours, theirs)


def test_an_import_path_names_a_class_or_a_function_that_returns_a_transform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_transforms.py").write_text(
        "class Add:\n"
        "    def __init__(self, amount, interpolation='x'):\n"
        "        self.amount, self.interpolation = amount, interpolation\n"
        "    def __call__(self, image):\n"
        "        return image + self.amount\n"
        "def make(amount):\n"
        "    return Add(amount)\n"
        "def broken():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    add = make({"name": "own_transforms.Add", "amount": 2, "interpolation": "mine"})
    assert add.interpolation == "mine"  # what text means is the owner's business
    assert (
        make({"name": "own_transforms.make", "amount": 3})(torch.zeros(1)).item() == 3
    )
    assert error({"name": "own_transforms.Add"}).key == f"{KEY}[0].amount"
    assert "int, which cannot be called" in str(
        error({"name": "own_transforms.broken"})
    )


@pytest.mark.parametrize(
    ("items", "key", "text"),
    [
        ([{"name": "RandomCrob", "size": 3}], "[0].name", 'did you mean "RandomCrop"?'),
        (
            [{"name": "RGB"}, {"name": "RandomCrop", "size": 3, "paddin": 4}],
            "[1].paddin",
            '"padding"',
        ),
        ([{"name": "RandomCrop"}], "[0].size", "needs this argument"),
        ([{"size": 3}], "[0].name", "is missing"),
        (["RandomCrop"], "[0].name", "is missing"),
        ([{"name": "RandomHorizontalFlip", "p": 3}], "[0]", "interval"),
        (
            [{"name": "Resize", "size": 3, "interpolation": "bilinea"}],
            "[0].interpolation",
            '"bilinear"',
        ),
        ([{"name": "ToDtype", "dtype": "float23"}], "[0].dtype", '"float32"'),
        ([{"name": "AutoAugment", "policy": "cifar"}], "[0].policy", '"cifar10"'),
        (
            [{"name": "RandomApply", "transforms": [{"name": "Reisze"}]}],
            "[0].transforms[0].name",
            '"Resize"',
        ),
        (
            [{"name": "RandomApply", "transforms": {"name": "Resize"}}],
            "[0].transforms",
            "not a list",
        ),
        ([{"name": "MixUp", "num_classes": 3}], "[0].name", "mixes"),
        ([{"name": "no_such_package.Crop"}], "[0].name", "cannot import"),
    ],
)
def test_errors_name_the_key_and_the_fix(items: list[Any], key: str, text: str) -> None:
    caught = error(*items)
    assert caught.key == KEY + key
    assert text in caught.message


def test_a_class_target_is_left_alone() -> None:
    flip = v2.RandomHorizontalFlip(p=1.0)
    flipped, target = apply(flip, image(), 7)
    assert torch.equal(flipped, image().flip(-1))
    assert target == 7
    tensor = torch.arange(6.0).view(2, 3)
    assert apply(flip, image(), tensor)[1] is tensor
    # A transform of the image alone.
    brighter, same = apply(lambda image: image + 1, image(), tensor)
    assert torch.equal(brighter, image() + 1) and same is tensor


def test_a_mask_and_boxes_follow_their_image() -> None:
    flip = v2.RandomHorizontalFlip(p=1.0)
    mask = tv_tensors.Mask(image()[0])
    flipped, flipped_mask = apply(flip, image(), mask)
    assert torch.equal(flipped[0], flipped_mask)
    boxes = tv_tensors.BoundingBoxes(
        [[0, 0, 10, 20]], format="XYXY", canvas_size=(32, 32)
    )
    assert apply(flip, image(), boxes)[1].tolist() == [[22, 0, 32, 20]]


def test_a_mask_is_cropped_where_its_image_is() -> None:
    crop = v2.RandomCrop(8)
    for _ in range(5):
        cropped, mask = apply(crop, image(), tv_tensors.Mask(image()[0]))
        assert torch.equal(cropped[0], mask)
