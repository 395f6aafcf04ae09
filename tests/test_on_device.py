"""`data.on_device` and `data.batch_transforms`: what lies where, what is said of it, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.distributed.small import config, header_of
from tests.distributed.test_on_device import net
from trainer import ConfigError, DataError, Trainer
from trainer.config.import_paths import import_paths
from trainer.core import device_sets
from trainer.core.no_effect import keys_without_effect
from trainer.errors import LockstepError

HERE = __name__
FLIP = [{"name": "RandomHorizontalFlip", "p": 1.0}]


class Darker:
    """A batch transform of a user's own."""

    draws = 1

    def __init__(self, by: int = 2) -> None:
        self.by = by

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        return images // self.by


class LessThanTheBatch(Darker):
    """What it makes of an image depends on the others."""

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        return images - images.amin(0)


class Samples:
    """What `sample` gives for each of 12 ids."""

    def __init__(self, sample: Any) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.sample(i)  # type: ignore[no-any-return]


def image(side: int = 8) -> Tensor:
    return torch.full((3, side, side), 100, dtype=torch.uint8)


def masked(i: int) -> tuple[Tensor, Tensor]:
    return image(), torch.zeros(8, 8, dtype=torch.int64)


def noisy(i: int) -> tuple[Tensor, int]:
    return torch.randint(256, (3, 8, 8)).to(torch.uint8), 0


def growing(i: int) -> tuple[Tensor, int]:
    return image(8 + (i == 11)), i % 2


def by_name(i: int) -> tuple[dict[str, Tensor], int]:
    return {"image": image()}, 0


def plain(i: int) -> tuple[Tensor, int]:
    return image(), i % 3


def digits(directory: Path, **changes: Any) -> Trainer:
    settings = {"model__width": 2, "data__on_device": True, **changes}
    return Trainer(config(directory, **settings))


def of_samples(directory: Path, sample: Any, **changes: Any) -> Trainer:
    settings = config(directory, **{"batch__size": 4, **changes})
    return Trainer(settings, model=net(), train_data=Samples(sample))


def test_header_says_what_lies_there_and_what_is_done_there(tmp_path: Path) -> None:
    trainer = digits(tmp_path, data__batch_transforms=FLIP, data__workers=2)
    facts = header_of(trainer, tmp_path)
    assert facts["on device"] == "1,797 samples, 0.1 MB in each process"
    assert facts["batch transforms"] == "RandomHorizontalFlip"
    (line,) = keys_without_effect(trainer.run)
    assert line.startswith("data.workers has no effect: the data are in memory")
    plain_facts = header_of(digits(tmp_path, data__on_device=False), tmp_path)
    assert not {"on device", "batch transforms"} & plain_facts.keys()


def test_a_batch_is_what_the_transform_makes_of_what_the_host_gives(
    tmp_path: Path,
) -> None:
    for on_device in (False, True):
        run = digits(
            tmp_path, data__on_device=on_device, data__batch_transforms=FLIP
        ).run
        loader = run.train_loader
        images, targets = run.data.train.batch(torch.arange(5))  # type: ignore[attr-defined]
        batch = loader.peek(range(5))
        assert torch.equal(loader.fetch(range(5)).inputs, images)
        assert torch.equal(batch.inputs, images.flip(3) * loader.normalize.scale)
        assert torch.equal(batch.targets, targets)
        # Training images alone are changed.
        assert run.val_loader is not None
        assert run.val_loader.batch_transforms is None


def test_a_transform_of_ones_own_is_named_by_its_import_path(tmp_path: Path) -> None:
    items = [{"name": f"{HERE}.Darker", "by": 4}]
    trainer = digits(tmp_path, data__batch_transforms=items)
    loader = trainer.run.train_loader
    raw = loader.fetch([0, 1]).inputs
    expected = (raw // 4) * loader.normalize.scale
    assert torch.equal(loader.peek([0, 1]).inputs, expected)
    trainer.prove()
    assert not trainer.proof.findings
    paths = [path.name for path in import_paths(trainer.config)]
    assert f"{HERE}.Darker" in paths


def test_the_proof_finds_one_that_looks_at_the_whole_batch(tmp_path: Path) -> None:
    items = [{"name": f"{HERE}.LessThanTheBatch"}]
    trainer = digits(
        tmp_path, data__batch_transforms=items, run__reproducibility="bitwise"
    )
    with pytest.raises(ConfigError, match="another image of train sample"):
        trainer.prove()


def test_the_signature_has_the_size_that_the_model_sees(tmp_path: Path) -> None:
    crop = [{"name": "RandomCrop", "size": 6}]
    signature = of_samples(tmp_path, plain, data__batch_transforms=crop).run.signature
    assert (signature.shape, signature.dtype) == ([3, 6, 6], "uint8")


def test_images_of_a_folder_are_decoded_once(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label, value in (("a", 10), ("b", 200)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(6):
                picture = Image.new("RGB", (8 + i, 8 + i), (value, value, i))
                picture.save(folder / f"{i}.png")
    changes = {
        "data__name": "folder",
        "data__root": str(tmp_path / "images"),
        "data__train_transforms": [{"name": "Resize", "size": [8, 8]}],
        "data__val_transforms": [{"name": "Resize", "size": [8, 8]}],
        "batch__size": 4,
    }
    there = digits(tmp_path, **changes)
    weights = there.fit()["weights_sha256"]
    here = digits(tmp_path, **changes, data__on_device=False)
    assert here.fit()["weights_sha256"] == weights


def deep(i: int) -> tuple[Tensor, Tensor]:
    """An image of 16 bits a channel, and an unsigned target."""
    pixels = torch.arange(3 * 8 * 8).reshape(3, 8, 8) * 300 + 1000 * i
    return pixels.to(torch.uint16), torch.tensor(i % 3, dtype=torch.uint16)


def test_wide_images_and_random_transforms_of_evaluations_are_as_from_the_host(
    tmp_path: Path,
) -> None:
    rows = []
    for on_device in (True, False):
        settings = config(
            tmp_path / str(on_device),
            batch__size=4,
            batch__eval_size=5,
            data__on_device=on_device,
            data__val_transforms=[{"name": "RandomHorizontalFlip"}],
        )
        trainer = Trainer(
            settings, model=net(), train_data=Samples(deep), val_data=Samples(deep)
        )
        trainer.fit()
        rows.append((trainer.evaluate(), trainer.digest()))
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("sample", "changes", "message"),
    [
        (noisy, {}, "or the data set draws random numbers"),
        (plain, {"train_transforms": FLIP}, "data.train_transforms or the data set"),
        (plain, {"collate": "lists"}, "data.collate=lists makes them on the host"),
        (by_name, {}, "the inputs of train are a dict of image"),
    ],
)
def test_sets_that_cannot_lie_there_are_refused_by_name(
    tmp_path: Path, sample: Any, changes: dict[str, Any], message: str
) -> None:
    settings = {f"data__{name}": value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=r"data\.on_device: ") as error:
        of_samples(tmp_path, sample, data__on_device=True, **settings)
    assert message in str(error.value)


def test_images_of_several_sizes_are_refused_when_they_are_read(tmp_path: Path) -> None:
    trainer = of_samples(
        tmp_path, growing, data__on_device=True, best__metric="train/loss"
    )
    with pytest.raises(DataError, match="Resize"):
        trainer.load_from(0)


def test_sets_that_do_not_fit_are_refused_with_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_sets, "free_memory", lambda device: 1000)
    digits(tmp_path)  # in memory already
    with pytest.raises(ConfigError, match=r"12 samples need 0\.0 MB") as error:
        of_samples(tmp_path, plain, data__on_device=True)
    assert error.value.key == "data.on_device"


def test_targets_that_would_have_to_move_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would move the images and not") as error:
        of_samples(tmp_path, masked, data__batch_transforms=FLIP)
    assert error.value.key == "data.batch_transforms"


def test_a_resume_refuses_other_batch_transforms(tmp_path: Path) -> None:
    digits(tmp_path, train__max_steps=2).fit()
    changes = {"run__resume": "auto", "train__max_steps": 3}
    with pytest.raises(LockstepError, match=r"data\.batch_transforms"):
        digits(tmp_path, **changes, data__batch_transforms=FLIP).fit()
