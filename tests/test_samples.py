"""Samples of every kind: converted where the meaning is plain, else one message that names sample and remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

from tests.distributed.small import config
from trainer import Trainer
from trainer.config.data_section import DataConfig
from trainer.core.build import build_run
from trainer.data.batches import MicroBatch, Request
from trainer.data.geometry import SampleTransform
from trainer.data.loading import (
    BY_BATCH_TRANSFORMS,
    WITHOUT_DEVICE_SET,
    Loader,
    Normalize,
)
from trainer.data.samples import KeyedDataset
from trainer.data.transforms import build_transforms
from trainer.errors import ConfigError, DataError

CPU = torch.device("cpu")
PIXELS = torch.randint(
    0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
ROWS = PIXELS.permute(1, 2, 0).contiguous().numpy()  # as images are decoded: (H, W, C)


def load(
    samples: list[Any], *transforms: dict[str, Any], ids: list[int] | None = None
) -> MicroBatch:
    """A micro-batch of samples, or the error that a loader would raise."""
    transform = build_transforms("data.train_transforms", list(transforms))
    keyed = KeyedDataset(samples, transform, seed=0, purpose="train")
    batch = keyed[Request(0, 0, np.array(ids or range(len(samples))))]
    if isinstance(batch, DataError):
        raise batch
    return batch


def error(samples: list[Any], *transforms: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        load(samples, *transforms)
    return str(caught.value)


# ---------------------------------------------------------------- what is converted


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(ROWS), PIXELS),
        (Image.fromarray(ROWS[:, :, 0]), PIXELS[:1]),
        (Image.fromarray(ROWS).convert("P"), None),
        (ROWS, PIXELS),
        (ROWS[:, ::-1], PIXELS.flip(2)),
        (ROWS.astype(">u2"), torch.from_numpy(ROWS.astype(np.uint16))),
        (PIXELS.numpy(), PIXELS),
        (ROWS[:, :, :1], PIXELS[:1]),
        (ROWS.astype(np.float32), torch.from_numpy(ROWS.astype(np.float32))),
    ],
    ids=[
        "pil",
        "pil-grey",
        "pil-palette",
        "hwc",
        "flipped",
        "big-endian",
        "chw",
        "hw1",
        "float",
    ],
)
def test_images_of_pil_and_numpy_become_tensors(
    image: Any, expected: Tensor | None
) -> None:
    inputs = load([(image, 1), (image, 0)]).inputs
    if expected is None:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert inputs.dtype == expected.dtype
    assert torch.equal(inputs[1], expected)


@pytest.mark.parametrize(
    "row", [("image", "label"), ("img", "labels"), ("pixel_values", "target")]
)
def test_a_row_of_an_image_and_a_label_is_a_pair(row: tuple[str, str]) -> None:
    samples = [{row[0]: ROWS, row[1]: 2, "file": "a.png"}] * 2
    batch = load(samples)
    assert torch.equal(batch.inputs[0], PIXELS)
    assert batch.targets.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (np.int64(3), torch.tensor([3, 3])),
        (np.float32(0.5), torch.tensor([0.5, 0.5])),
        (torch.tensor(3), torch.tensor([3, 3])),
        (np.array([0, 1]), torch.tensor([[0, 1], [0, 1]])),
        (Image.fromarray(ROWS[:, :, 0]), PIXELS[:1].expand(2, -1, -1)),
        (Image.fromarray(ROWS[:, :, 0]).convert("1"), None),
        (True, torch.tensor([True, True])),
    ],
)
def test_targets_of_every_kind_become_one_tensor(
    target: Any, expected: Tensor | None
) -> None:
    targets = load([(PIXELS, target)] * 2).targets
    if expected is None:
        expected = torch.from_numpy(np.array(target)).expand(2, -1, -1)
    assert targets.dtype == expected.dtype
    assert torch.equal(targets, expected)


def test_an_array_goes_through_torchvisions_transforms_as_an_image() -> None:
    flip = {"name": "RandomHorizontalFlip", "p": 1.0}
    assert torch.equal(load([(ROWS, 0)], flip).inputs[0], PIXELS.flip(2))
    # A transform of its own gets what the data set gives.
    own = SampleTransform(
        v2.Compose([lambda image: image[::-1], v2.RandomVerticalFlip(1.0)])
    )
    assert torch.equal(own(ROWS.copy(), 0)[0], PIXELS)


class Names:
    names = ("ants", "bees")


class Rows:
    """A data set of rows, as Hugging Face's library gives them, with the class names in its features."""

    def __init__(self) -> None:
        self.features = {"image": None, "label": Names()}

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = np.full((8, 8, 3), 255 * (index % 2), dtype=np.uint8)
        return {"image": Image.fromarray(pixels), "label": index % 2}


def test_a_run_on_rows_of_images_and_labels(tmp_path: Path) -> None:
    settings = config(
        tmp_path, batch__size=6, optimizer__lr=0.5, train__precision="fp32"
    )
    trainer = Trainer(settings, train_data=Rows(), val_data=Rows())
    assert trainer.run.data.classes == ["ants", "bees"]
    assert trainer.run.signature.channels == 3
    trainer.fit()
    assert trainer.evaluate()["accuracy"] == 1.0


# ---------------------------------------------------------------- what is refused, by name


@pytest.mark.parametrize(
    ("samples", "texts"),
    [
        ([(PIXELS, 0, 1)], ["train sample 0 is a tuple of 3", "pair (input, target)"]),
        ([PIXELS], ["train sample 0 is a Tensor (3, 5, 7) of uint8"]),
        (["ab"], ['train sample 0 is the text "ab"']),
        ([7], ["train sample 0 is a int"]),
        ([{"a": 1, "b": 2}], ["train sample 0 is a row of a, b", "image, img"]),
        ([{"image": 1, "label": 2, "mask": 3}], ["is a row of image, label, mask"]),
        ([(PIXELS, None)], ["train sample 0: its target is None", "return 0"]),
        ([(PIXELS, object())], ["train sample 0: its target is a object"]),
        ([(None, 1)], ["train sample 0: its input is None"]),
        (
            [(PIXELS, torch.zeros(2, 4)), (PIXELS, torch.zeros(3, 4))],
            [
                "the target of sample 0 is a Tensor (2, 4) of float32, that of sample 1 a Tensor (3, 4)",
                "pad each to one length",
            ],
        ),
        (
            [(PIXELS, [1, 2]), (PIXELS, [1])],
            ["the target of sample 0 is a list of 2", "sample 1 a list of 1"],
        ),
        (
            [(PIXELS, 0), (PIXELS[:, :4], 0)],
            ["the input of sample 0", "(3, 4, 7)", "data.train_transforms", "Resize"],
        ),
        (
            [({"ids": torch.zeros(3)}, 0), ({"ids": torch.zeros(4)}, 0)],
            [
                "ids: a Tensor (3,) of float32",
                "sample 1 ids: a Tensor (4,)",
                "pad each",
            ],
        ),
        (
            [(PIXELS, 1), (PIXELS, "a")],
            ["the target of sample 0 is a int", 'the text "a"'],
        ),
    ],
)
def test_what_makes_no_batch_is_named(samples: list[Any], texts: list[str]) -> None:
    message = error(samples)
    for text in texts:
        assert text in message
    assert "\n" not in message


def test_a_worker_sends_the_message_and_no_traceback() -> None:
    keyed = KeyedDataset([(PIXELS, None)], None, seed=0, purpose="train")
    loader = Loader(
        keyed, DataConfig(workers=1), CPU, Normalize(None, None, torch.float32)
    )
    with pytest.raises(DataError) as caught:
        next(loader.run([Request(0, 0, np.array([0]))]))
    assert str(caught.value).startswith("train sample 0: its target is None")
    assert "Traceback" not in str(caught.value)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield PIXELS, 0


DATA = TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))


class Parts(dict[str, Any]):
    """As a library returns all parts of a data set; a plain dict would be validation sets by name."""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (DataLoader(DATA), "Give the loader's data set, `loader.dataset`"),
        (Parts(train=DATA, test=DATA), "Give one of its entries ('train', 'test')"),
        (Stream(), "reads any sample by its number"),
        ((torch.zeros(4, 3), torch.zeros(4)), "TensorDataset(inputs, targets)"),
        ("images/", "name one in data.name with its data.root"),
        (iter([1]), "must have __len__ and __getitem__"),
        ([], "holds no samples"),
    ],
)
@pytest.mark.parametrize("part", ["train_data", "val_data"])
def test_what_is_no_data_set_is_refused_with_the_way_out(
    tmp_path: Path, data: Any, text: str, part: str
) -> None:
    parts = {"train_data": DATA, "val_data": DATA} | {part: data}
    with pytest.raises((ConfigError, DataError)) as caught:
        build_run(config(tmp_path), model=nn.Linear(3, 2), **parts)
    assert text in str(caught.value) and part in str(caught.value)


def test_validation_data_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^val_data: is given without train_data"):
        build_run(config(tmp_path), val_data=DATA)


# ---------------------------------------------------------------- models and the first sample


def images(channels: int, classes: int = 2, count: int = 8) -> TensorDataset:
    draw = torch.Generator().manual_seed(channels)
    pixels = torch.rand(count, channels, 8, 8, generator=draw)
    return TensorDataset(pixels, torch.arange(count) % classes)


def start_error(tmp_path: Path, **parts: Any) -> str:
    changes = {name: parts.pop(name) for name in list(parts) if "__" in name}
    with pytest.raises((ConfigError, DataError)) as caught:
        build_run(config(tmp_path, train__precision="fp32", **changes), **parts)
    return str(caught.value)


@pytest.mark.parametrize("leaves_out", [False, True])
@pytest.mark.parametrize("batches", [[[0, 1]], [[0], [1]]])
def test_bytes_and_floats_in_one_data_set_are_refused(
    leaves_out: bool, batches: list[list[int]]
) -> None:
    """torch would make floats of a batch with both, and what a byte means would depend on its neighbours."""
    samples = [(PIXELS, 0), (PIXELS / 255, 1)]
    keyed = KeyedDataset(samples, None, seed=0, purpose="train", leaves_out=leaves_out)
    answers = [keyed[Request(0, 0, np.array(ids))] for ids in batches]
    assert isinstance(answers[-1], DataError)
    assert str(answers[-1]).startswith(
        "train sample 1: its input is float32, and that of train sample 0 uint8;"
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.int32, torch.int64)],
)  # fmt: skip
def test_widths_of_one_range_are_mixed(first: torch.dtype, second: torch.dtype) -> None:
    samples = [(PIXELS.to(first), 0), (PIXELS.to(second), 1)]
    assert load(samples).inputs.dtype == second


def test_channels_that_do_not_fit_are_named_at_the_start(tmp_path: Path) -> None:
    named = {"model__name": "resnet18", "model__num_classes": 2}
    message = start_error(tmp_path, train_data=images(1), val_data=images(1), **named)
    assert "resnet18 takes images of 3 channels, and the data's have 1" in message
    assert "{name: RGB}" in message
    transforms = [{"name": "RGB"}]
    changes = {"data__train_transforms": transforms, "data__val_transforms": transforms}
    build_run(
        config(tmp_path, train__precision="fp32", **named, **changes),
        train_data=images(1),
        val_data=images(1),
    )
    message = start_error(
        tmp_path, model__num_classes=2, train_data=images(3), val_data=images(1)
    )
    assert "training images have 3 channels and validation images 1" in message


def test_arrays_whose_channels_lie_last_are_noted(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    for shape, noted in {
        (24, 20, 3): True,
        (3, 24, 20): False,
        (64, 4, 4): False,
    }.items():
        data = [(draws.random(shape), label) for label in (0, 1, 0, 1)]
        settings = config(tmp_path, model__name="small_cnn", model__num_classes=2)
        run = build_run(settings, train_data=data, val_data=data)
        assert bool(run.inputs_note) == noted
        if noted:
            assert "images of 24 channels and 20 × 3 pixels" in run.inputs_note


def test_images_of_several_sizes_are_advised_by_the_batch_transforms(
    tmp_path: Path,
) -> None:
    data = [(torch.zeros(3, 8 + n, 8, dtype=torch.uint8), 0) for n in range(4)]
    crop, flip = (
        {"name": "RandomResizedCrop", "size": 8},
        {"name": "RandomHorizontalFlip"},
    )
    for changes, advice in (
        (
            {"data__batch_transforms": [crop], "data__on_device": True},
            WITHOUT_DEVICE_SET,
        ),
        ({"data__batch_transforms": [flip, crop]}, BY_BATCH_TRANSFORMS),
        ({}, "does"),
    ):
        settings = config(tmp_path, model__num_classes=2, **changes)
        run = build_run(settings, train_data=data, val_data=data[:1])
        with pytest.raises(DataError) as caught:
            run.train_loader.peek([0, 1])
        assert str(caught.value).endswith(advice)


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    data = images(1)
    data.classes = ["bees"]  # type: ignore[attr-defined]
    assert "has the class bees alone" in start_error(
        tmp_path, train_data=data, val_data=data
    )
    build_run(config(tmp_path, loss__name="mse"), train_data=data, val_data=data)


def lazy_net() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2)
    )


def test_lazy_layers_get_their_size_from_the_first_sample(tmp_path: Path) -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trainer = Trainer(
            config(tmp_path / str(seed), batch__size=4, train__precision="fp32"),
            model=lazy_net(),
            train_data=images(3),
            val_data=images(3),
        )
        weights.append(trainer.digest())
        assert trainer.module[3].weight.shape == (2, 144)
        assert int(trainer.module[1].num_batches_tracked) == 0
        trainer.fit()
    assert weights[0] == weights[1]  # a function of run.seed
    message = start_error(
        tmp_path,
        model=nn.Sequential(nn.LazyLinear(2), nn.Linear(3, 2)),
        train_data=images(3),
    )
    assert "lazy layers need a first input" in message


class Pretrained(nn.Module):
    """A model whose `from_pretrained` passes what it does not know on, as Hugging Face's does."""

    def __init__(self, labels: int = 2) -> None:
        super().__init__()
        self.head = nn.Linear(3, labels)

    @classmethod
    def from_pretrained(cls, path: str, **arguments: Any) -> Pretrained:
        return cls(**arguments)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(inputs)
        return output


def test_from_pretrained_gets_no_argument_that_it_does_not_name(tmp_path: Path) -> None:
    name = f"{__name__}.Pretrained.from_pretrained"
    settings = config(tmp_path, model__name=name, model__path="x", model__num_classes=2)
    run = build_run(settings, train_data=DATA, val_data=DATA)
    assert isinstance(run.module, Pretrained)


def classifier(**arguments: Any) -> Pretrained:
    """Takes any argument, and passes it on to a model that does not."""
    return Pretrained(**arguments)


def test_an_argument_that_was_supplied_unasked_and_is_refused_is_left_out(
    tmp_path: Path,
) -> None:
    settings = config(tmp_path, model__name=f"{__name__}.classifier", model__labels=2)
    data = images(1)
    data.classes = ["ants", "bees"]  # type: ignore[attr-defined]
    run = build_run(settings, train_data=data, val_data=data)
    assert run.module.head.out_features == 2
    wrong = config(tmp_path, model__name=f"{__name__}.classifier", model__label=2)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'label'"):
        build_run(wrong, train_data=data, val_data=data)


# ---------------------------------------------------------------- masks, boxes and geometry

FLIP = {"name": "RandomHorizontalFlip", "p": 1.0}
CROP = {"name": "RandomCrop", "size": 4}
RESIZE = {"name": "Resize", "size": [10, 14]}


@pytest.mark.parametrize(
    "mask",
    [
        PIXELS[0].long(),
        PIXELS[0] > 100,
        PIXELS[:1],
        ROWS[:, :, 0],
        Image.fromarray(ROWS[:, :, 0]),
        {"mask": PIXELS[0].int()},
    ],
    ids=["int64", "bool", "(1, H, W)", "numpy", "pil", "dict"],
)
@pytest.mark.parametrize(
    "transform", [FLIP, CROP, RESIZE, {"name": "RandomRotation", "degrees": 90}]
)
def test_a_plain_mask_moves_with_its_image(
    mask: Any, transform: dict[str, Any]
) -> None:
    """Equal to what torchvision does with the mask declared as one."""
    batch = load(
        [(PIXELS, mask)], transform, {"name": "ColorJitter", "brightness": 0.5}
    )
    plain = mask["mask"] if isinstance(mask, Mapping) else mask
    declared = tv_tensors.Mask(plain if isinstance(plain, Tensor) else PIXELS[0])
    expected = load(
        [(PIXELS, declared)], transform, {"name": "ColorJitter", "brightness": 0.5}
    )
    assert torch.equal(batch.inputs, expected.inputs)
    targets = batch.targets["mask"] if isinstance(mask, Mapping) else batch.targets
    assert type(targets) is Tensor
    assert targets.dtype == declared.dtype
    assert torch.equal(targets, expected.targets)


def test_boxes_in_a_dict_move_with_their_image() -> None:
    boxes = tv_tensors.BoundingBoxes([[0, 0, 2, 5]], format="XYXY", canvas_size=(5, 7))
    batch = load([(PIXELS, {"boxes": boxes, "labels": torch.tensor([1])})], FLIP)
    assert torch.equal(batch.inputs[0], PIXELS.flip(2))
    assert batch.targets["boxes"].tolist() == [[[5, 0, 7, 5]]]
    assert batch.targets["labels"].tolist() == [[1]]


@pytest.mark.parametrize(
    ("target", "transforms", "texts"),
    [
        (
            PIXELS[0].float(),
            [FLIP],
            [
                "RandomHorizontalFlip would move the image and not its target",
                "tv_tensors.Mask",
            ],
        ),
        (PIXELS[:1].float(), [RESIZE], ["Resize would move"]),
        (
            torch.tensor([[0, 0, 2, 5]]),
            [{"name": "RandomApply", "transforms": [CROP]}],
            ["RandomCrop would move", "BoundingBoxes"],
        ),
        ({"boxes": torch.zeros(3, 4)}, [FLIP], ["BoundingBoxes"]),
        (
            torch.zeros(10, 14, dtype=torch.uint8),
            [FLIP],
            ["the size of the image, 5 × 7"],
        ),
        (PIXELS[0].long(), [{"name": "RandAugment"}], ["RandAugment moves the pixels"]),
        (
            PIXELS[0].long(),
            [{"name": "torchvision.transforms.RandomHorizontalFlip"}],
            ["RandomHorizontalFlip moves the pixels"],
        ),
    ],
)
def test_what_would_be_left_behind_is_refused(
    target: Any, transforms: list[dict[str, Any]], texts: list[str]
) -> None:
    message = error([(PIXELS, target)], *transforms)
    assert message.startswith("train sample 0: data.train_transforms: ")
    for text in texts:
        assert text in message


def test_what_has_no_place_in_the_image_stays_as_it_is() -> None:
    jitter = {"name": "ColorJitter", "brightness": 0.5}
    for target, transforms in (
        (torch.zeros(4), [FLIP]),
        (torch.zeros(2, 3), [FLIP]),
        (torch.zeros(3, 4), [RESIZE]),  # as shares of the image's size, say
        (PIXELS[0].float(), [jitter]),
        (v1.functional.to_pil_image(PIXELS), [jitter]),
    ):
        batch = load([(PIXELS, target)], *transforms)
        expected = target if isinstance(target, Tensor) else PIXELS
        assert torch.equal(batch.targets[0], expected)


def test_a_mask_beside_the_image_moves_and_another_image_is_refused() -> None:
    batch = load([({"image": PIXELS, "mask": PIXELS[0]}, 0)], FLIP)
    assert torch.equal(batch.inputs["image"][0], PIXELS.flip(2))
    assert torch.equal(batch.inputs["mask"][0], PIXELS[0].flip(1))
    message = error([({"image": PIXELS, "depth": PIXELS[0].float()}, 0)], FLIP)
    assert "would move the image and not its target" in message


def test_transforms_that_would_change_nothing_are_refused() -> None:
    for value in ([1.0, 2.0], {"image": ROWS}, "text"):
        message = error([(value, 0)], FLIP)
        assert "data.train_transforms would not change its input" in message


# ---------------------------------------------------------------- mean, std, whole numbers


def test_wider_whole_numbers_are_scaled_by_their_range_or_refused() -> None:
    levels = torch.arange(0, 65536, 4096).view(1, 1, 4, 4)
    normalize = Normalize([0.5], [0.25], torch.float64)
    expected = (levels.double() / 65535 - 0.5) / 0.25
    assert torch.equal(normalize(levels.to(torch.uint16)), expected)
    plain = Normalize(None, None, torch.float32)
    assert torch.equal(plain(levels.to(torch.uint16)), levels.float() / 65535)
    for dtype in (torch.int16, torch.int32):
        with pytest.raises(DataError, match=re.escape(str(dtype).split(".")[1])):
            plain(levels.to(dtype))
    # Ids, which a model embeds.
    assert plain(levels).dtype == torch.int64
    with pytest.raises(ConfigError, match=r"data\.mean: .* and torch\.int64"):
        normalize(levels)


@pytest.mark.parametrize("image", [{"image": PIXELS}, (PIXELS, PIXELS)])
def test_a_mean_without_effect_is_refused_at_the_start(
    tmp_path: Path, image: Any
) -> None:
    message = start_error(
        tmp_path, data__mean=[0.5], train_data=[(image, 0)] * 4, model=nn.Linear(3, 2)
    )
    assert message.startswith("data.mean: and data.std have no effect on inputs")


def test_uint16_samples_make_a_batch() -> None:
    sample = PIXELS.numpy().astype(np.uint16), 1
    keyed = KeyedDataset([sample] * 2, None, seed=0, purpose="train")
    loader = Loader(keyed, DataConfig(), CPU, Normalize(None, None, torch.float32))
    assert torch.equal(loader.peek([0, 1]).inputs[1], PIXELS.float() / 65535)


def test_keys_without_effect_are_refused_or_noted(tmp_path: Path) -> None:
    message = start_error(tmp_path, data__cache=1.0, train_data=DATA)
    assert message.startswith("data.cache: keeps the images of data.name=folder")
    settings = config(tmp_path, data__val_transforms=[FLIP])
    parts = {"model": nn.Linear(3, 2), "train_data": DATA}
    assert "data.val_transforms has no effect" in build_run(settings, **parts).data.note
    assert build_run(settings, val_data=DATA, **parts).data.note == ""
