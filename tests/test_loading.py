"""Normalisation, each part's own transforms, keyed draws, and samples that cannot be read."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config.data_section import DataConfig
from trainer.data.batches import MicroBatch, Request
from trainer.data.datasets import Datasets, ImageArrays, digits
from trainer.data.loading import (
    Loader,
    Normalize,
    _pin,
    _wait_for_copy,
    build_loader,
    build_loaders,
)
from trainer.data.samples import KeyedDataset
from trainer.errors import ConfigError, DataError
from trainer.exact.structures import tensors_in

CPU = torch.device("cpu")
MEAN, STD = [0.5, 0.25], [0.2, 0.4]


def pixels(dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.arange(2 * 2 * 3 * 3).view(2, 2, 3, 3).mul(7).to(dtype)


def test_bytes_are_scaled_to_one_then_normalised_by_channel() -> None:
    ours = Normalize(MEAN, STD, torch.float64)(pixels())
    mean, std = (np.array(values).reshape(1, 2, 1, 1) for values in (MEAN, STD))
    assert ours.dtype == torch.float64
    assert np.allclose(ours.numpy(), (pixels().numpy() / 255 - mean) / std, rtol=1e-14)


def test_mean_and_std_alone_and_neither() -> None:
    scaled = pixels().double() / 255
    shift, spread = (
        torch.tensor(MEAN).double().view(2, 1, 1),
        torch.tensor(STD).double().view(2, 1, 1),
    )
    for mean, std, expected in (
        (None, None, scaled),
        (MEAN, None, scaled - shift),
        (None, STD, scaled / spread),
    ):
        assert torch.allclose(
            Normalize(mean, std, torch.float64)(pixels()), expected, rtol=1e-6
        )


@pytest.mark.parametrize(
    ("shape", "mean"),
    [((4, 3, 2, 2), [0.5, 0.5]), ((4, 1, 2, 2), [0.1, 0.2]), ((4, 9), [0.5])],
)
def test_a_mean_fits_the_channels(shape: tuple[int, ...], mean: list[float]) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.mean: .* ([13] channels|inputs of \(4, 9\))"
    ):
        Normalize(mean, None, torch.float32)(torch.zeros(shape))


def test_floats_take_the_runs_dtype_unscaled_and_ids_stay_whole() -> None:
    for mean in (None, MEAN):
        assert (
            Normalize(mean, STD if mean else None, torch.float64)(
                pixels(torch.float32)
            ).dtype
            == torch.float64
        )
    assert torch.equal(
        Normalize(None, None, torch.float64)(pixels(torch.float32)),
        pixels(torch.float64),
    )
    assert (
        Normalize(None, None, torch.float32)(pixels(torch.int64)).dtype == torch.int64
    )


def test_undo_gives_the_image_back() -> None:
    normalize = Normalize(MEAN, STD, torch.float64)
    assert torch.allclose(
        normalize.undo(normalize(pixels())), pixels().float() / 255, atol=1e-6
    )


def test_each_part_has_its_own_transforms() -> None:
    part = ImageArrays(pixels(), torch.tensor([0, 1]))
    section = DataConfig(
        train_transforms=[{"name": "RandomHorizontalFlip", "p": 1.0}],
        val_transforms=[{"name": "RandomVerticalFlip", "p": 1.0}],
    )
    train, val = build_loaders(
        section,
        Datasets(part, part, None, "x"),
        seed=0,
        device=CPU,
        dtype=torch.float64,
    )
    assert val is not None
    scaled = pixels().double() / 255
    assert torch.allclose(train.peek([0, 1]).inputs, scaled.flip(-1))
    assert torch.allclose(val.peek([0, 1]).inputs, scaled.flip(-2))


class Draws:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.rand(3), i


def draw_inputs(seed: int) -> Tensor:
    batch = KeyedDataset(Draws(), None, seed=seed, purpose="train")[
        Request(0, 0, np.arange(4))
    ]
    assert not isinstance(batch, DataError)
    inputs: Tensor = batch.inputs
    return inputs


def test_augmentation_follows_the_seed_and_the_rank_keeps_its_generator() -> None:
    assert torch.equal(draw_inputs(1), draw_inputs(1))
    assert not torch.equal(draw_inputs(1), draw_inputs(2))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    keyed = KeyedDataset(Draws(), None, seed=1, purpose="train")
    Loader(keyed, DataConfig(), CPU, Normalize(None, None, torch.float32)).peek([0, 1])
    assert torch.equal(torch.rand(2), expected)


class OneBad(Draws):
    paths = ("a.png", "b.png", "c.png", "d.png")

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i == 2:
            raise ZeroDivisionError("no such pixel")
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_an_error_that_names_it_and_never_its_neighbour(
    workers: int,
) -> None:
    keyed = KeyedDataset(OneBad(), None, seed=0, purpose="train")
    loader = Loader(
        keyed, DataConfig(workers=workers), CPU, Normalize(None, None, torch.float32)
    )
    batches = loader.run([Request(index, 0, np.array([index])) for index in range(4)])
    assert [next(batches).first, next(batches).first] == [0, 1]
    with pytest.raises(DataError) as caught:
        next(batches)
    message = str(caught.value)
    assert message.startswith(
        "train sample 2 (c.png): ZeroDivisionError: no such pixel"
    )
    assert Path(__file__).name in message


def test_samples_of_different_shapes_are_an_error_that_names_them() -> None:
    class OfDifferentShapes(Draws):
        def __getitem__(self, i: int) -> tuple[Any, int]:
            return torch.zeros(1, 2 + i, 2), i

    answer = KeyedDataset(OfDifferentShapes(), None, seed=0, purpose="val")[
        Request(0, 0, np.arange(2))
    ]
    assert isinstance(answer, DataError)
    assert (
        "the input of sample 0 is a Tensor (1, 2, 2) of float32, that of sample 1 a Tensor (1, 3, 2)"
        in str(answer)
    )
    assert "data.val_transforms" in str(answer)


# ---------------------------------------------------------------- copies to a GPU


class Holder:
    """An object of somebody else's, that knows how to be pinned."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def pin_memory(self) -> Holder:
        return Holder(self.tensor.pin_memory())


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def nested_batch() -> tuple[MicroBatch, list[Tensor]]:
    """A micro-batch of eight tensors in every kind of container, and the tensors."""
    t = [torch.full((2,), float(number)) for number in range(8)]
    inputs = {"image": t[0], "views": [t[1], (t[2], Pair(t[3], t[4]))], "name": "a"}
    targets = (t[5], {"boxes": t[6], "count": 3}, Holder(t[7]))
    return MicroBatch(0, inputs, targets), t


def test_every_tensor_of_a_nested_batch_is_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[float] = []

    def pin(tensor: Tensor, *_: Any) -> Tensor:
        pinned.append(float(tensor[0]))
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch, tensors = nested_batch()
    result = _pin(batch)
    assert sorted(pinned) == list(range(8))
    assert isinstance(result, MicroBatch)
    assert result.inputs["name"] == "a" and isinstance(
        result.inputs["views"][1][1], Pair
    )
    assert not {
        id(tensor) for tensor in tensors_in((result.inputs, result.targets))
    } & {id(t) for t in tensors}


def test_the_memory_of_every_tensor_of_a_nested_batch_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stream:
        def wait_event(self, event: Any) -> None:
            assert event == "end of copy"

    stream = Stream()
    recorded: list[tuple[float, Any]] = []
    monkeypatch.setattr(
        Tensor,
        "record_stream",
        lambda tensor, user: recorded.append((float(tensor[0]), user)),
    )
    _wait_for_copy(nested_batch()[0], "end of copy", stream)  # type: ignore[arg-type]
    assert sorted(number for number, _ in recorded) == list(range(8))
    assert all(user is stream for _, user in recorded)


def test_images_as_they_were_are_not_held_while_they_are_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = DataConfig(name="digits", mean=[0.5], std=[0.5])
    loader = build_loader(
        section,
        digits().train,
        "train",
        [],
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    held: list[weakref.ref[Tensor]] = []
    read = loader.dataset.__class__.__getitem__

    def note(dataset: KeyedDataset, request: Request) -> Any:
        batch = read(dataset, request)
        assert isinstance(batch, MicroBatch)
        held.append(weakref.ref(batch.inputs))
        return batch

    monkeypatch.setattr(KeyedDataset, "__getitem__", note)
    for _ in loader.run([Request(0, 0, np.arange(4)), Request(1, 0, np.arange(4))]):
        assert held[-1]() is None
    assert len(held) == 2
