"""`compare`: what it says of runs that are the same, that differ in their config, data or rounding."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net
from tests.programs import run_program
from trainer import Trainer
from trainer.data.datasets import FakeImages, ImageArrays
from trainer.data.folder import ImageFolder
from trainer.errors import DataError
from trainer.inspection.compare import compare
from trainer.storage.fingerprint import fingerprint


def fit(
    directory: Path,
    *,
    name: str,
    samples: int = 56,
    spoilt: bool = False,
    **changes: object,
) -> None:
    settings = config(
        directory, run__name=name, batch__micro_size=7, train__log_every=1, **changes
    )
    trainer = Trainer(
        settings, model=conv_net(), train_data=Images(samples), val_data=Images(28)
    )
    if spoilt:
        second = trainer.plan.step(1)

        def spoil(*_: object) -> None:
            if trainer.progress.step == second.number - 1:
                next(trainer.module.parameters()).data[0, 0, 0, 0] += 1e-12

        trainer.optimizer.register_step_pre_hook(spoil)
    trainer.fit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    bitwise = {"run__reproducibility": "bitwise"}
    on_ranks(1, fit, directory, name="one", **bitwise)
    on_ranks(2, fit, directory, name="two", **bitwise)
    on_ranks(1, fit, directory, name="spoilt", spoilt=True, **bitwise)
    on_ranks(1, fit, directory, name="other", samples=55, optimizer__lr=0.2, **bitwise)
    return directory


def test_the_same_run_elsewhere_is_the_same(runs: Path) -> None:
    comparison = compare(runs / "one", runs / "two")
    assert comparison.same
    assert comparison.steps == [1, 2, 3, 4]
    assert comparison.environment == {"processes": (1, 2)}
    assert not comparison.config
    assert not comparison.data
    assert comparison.free == {"run.name": ("one", "two")}


def test_the_first_step_of_a_difference_is_found(runs: Path) -> None:
    """One weight is moved by 1e-12 within step 2: its digest parts there, and the loss in the step after it."""
    comparison = compare(runs / "one", runs / "spoilt")
    assert not comparison.same
    assert comparison.first_differences["digest"][0] == 2
    assert comparison.first_differences["train/loss"][0] == 3
    assert 0 < comparison.largest_differences["train/loss"] < 1e-10


def test_config_and_data_are_named(runs: Path) -> None:
    comparison = compare(runs / "one", runs / "other")
    assert comparison.config == {"optimizer.lr": (0.1, 0.2)}
    assert list(comparison.data) == ["train"]


def test_the_command_says_it_and_its_status_too(runs: Path, tmp_path: Path) -> None:
    def command(*names: str) -> CompletedProcess[str]:
        return run_program(
            ["-m", "trainer", "compare", *(runs / name for name in names)]
        )

    assert command("one", "two").returncode == 0
    parted = command("one", "spoilt")
    assert parted.returncode == 1
    assert "from step 2      weights" in parted.stdout
    missing = command("one", "absent")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "is not a run directory" in missing.stderr


def test_fingerprints_see_samples_and_not_their_place_on_disk(tmp_path: Path) -> None:
    def folder(name: str, contents: bytes) -> ImageFolder:
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "1.png").write_bytes(contents)
        return ImageFolder(tmp_path / name, ["a/1.png"], [0])

    same, moved, longer = (
        folder(n, c) for n, c in (("x", b"1"), ("y", b"1"), ("z", b"12"))
    )
    assert fingerprint(same) == fingerprint(moved) != fingerprint(longer)
    images, targets = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])
    arrays = [
        ImageArrays(images, targets),
        ImageArrays(images + 1, targets),
        ImageArrays(images, targets.flip(0)),
    ]
    fakes = [FakeImages("train", 5, (1, 2, 2), 2), FakeImages("val", 5, (1, 2, 2), 2)]
    assert (
        len(
            {
                fingerprint(each).sha256
                for each in [*arrays, *fakes, Images(5), Images(6)]
            }
        )
        == 7
    )
    (tmp_path / "x" / "a" / "1.png").unlink()
    with pytest.raises(
        DataError, match=r"1\.png cannot be read \(No such file or directory\)"
    ):
        fingerprint(same)
