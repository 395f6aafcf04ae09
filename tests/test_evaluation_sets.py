"""The validation sets and the test set that a config names."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from trainer import Config, ConfigError, DataError, Trainer, load
from trainer.__main__ import main
from trainer.config.data_section import DataConfig
from trainer.data.datasets import Datasets, build_datasets
from trainer.data.evaluation_loaders import evaluation_loaders
from trainer.data.evaluation_sets import with_evaluation_sets
from trainer.data.shapes import Shapes


def make(**keys: Any) -> Datasets:
    section = Config.from_dict({"data": keys}).data
    data = build_datasets(section, nullcontext)
    return with_evaluation_sets(section, data, nullcontext)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(path.name), 0, 0)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders for training and two sets, without val/; and elsewhere class folders right in one."""
    for name in (
        *("train/ants/1.png", "train/bees/1.png", "clean/bees/1.png"),
        *("clean/ants/2.png", "held_out/bees/3.png", "elsewhere/bees/4.png"),
    ):
        picture(tmp_path / name)
    return tmp_path


def test_folders(root: Path) -> None:
    other = {"root": str(root / "elsewhere"), "folder": "."}
    sets = {"clean": {"folder": "clean"}, "shifted": other}
    test = {"folder": "held_out"}
    data = make(name="folder", root=str(root), val=sets, test=test)
    assert list(data.evaluated()) == ["val/clean", "val/shifted", "test"]
    assert data.val is data.named["clean"]
    of_clean: Any = data.named["clean"]
    assert (of_clean.paths, of_clean.targets) == (
        ["clean/ants/2.png", "clean/bees/1.png"],
        [0, 1],
    )
    # By name: here there are no ants.
    assert data.named["shifted"][0][1] == data.test[0][1] == 1  # type: ignore[index]
    with pytest.raises(DataError, match=r"val is missing"):
        make(name="folder", root=str(root), val={**sets, "own": {}})
    picture(root / "clean/wasps/1.png")
    with pytest.raises(DataError, match=r"clean/wasps is a class that the training"):
        make(name="folder", root=str(root), val=sets)


def test_other_data_sets_and_parts() -> None:
    small = {"size": 20, "val_size": 6, "image_size": 8}
    sets = {"own": {}, "more": {"val_size": 9}, "train": {"part": "train"}}
    data = make(name="fake", **small, val=sets, test={"name": "digits"})
    assert [len(part) for part in data.evaluated().values()] == [6, 9, 20, 358]
    assert torch.equal(data.named["more"][3][0], data.named["own"][3][0])


class Backwards(TensorDataset):
    """The digits' classes in another order."""

    classes = tuple(reversed("0123456789"))

    def __init__(self, split: str) -> None:
        samples = {"train": 4, "val": 2, "far": 3}[split]
        super().__init__(torch.zeros(samples, 1, 8, 8), torch.full((samples,), 9))


def test_an_import_path_gives_one_part_and_its_classes_go_by_name() -> None:
    name = f"{__name__}.Backwards"
    sets = {"near": {"name": name}, "far": {"name": name, "split": "far"}}
    data = make(name="digits", val=sets)
    assert [len(part) for part in data.named.values()] == [2, 3]
    assert data.named["far"][0][1] == 0


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"val": {"root": "x"}}, "data.val.root: x is not a mapping; data.val names"),
        ({"val": {"a/b": {}}}, "data.val.a/b: a set's name is part of"),
        ({"val": {"a": {"part": "test"}}}, "data.val.a.part: test is not one of"),
        ({"val": {"a": {"sise": 3}}}, "data.val.a.sise: digits has no such argument"),
        ({"val": {"a": {"workers": 2}}}, "data.val.a.workers: holds for all sets"),
        ({"val": {"a": {"name": "digit"}}}, 'data.val.a.name: "digit" is not one of'),
        ({"val": {"a": {"folder": "x"}}}, "data.val.a.folder: is for data.name=folder"),
        ({"val": {"a": {"name": "folder"}}}, "data.val.a.root: is not set"),
        ({"test": {}}, "data.test: names nothing of its own"),
        ({"test": {"root": "x"}}, "data.test.root: digits takes no root"),
    ],
)
def test_what_is_wrong_is_named(keys: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(name="digits", **keys)
    assert str(caught.value).startswith(error)


def test_sets_are_plain_values_of_a_config() -> None:
    overrides = [
        "data.val.clean.root=0777",
        "data.val.clean.transforms=[{name: RandomCrop, size: 8}]",
        "data.test.folder=1e5",
    ]
    config = load(None, overrides)
    assert config.data.val["clean"]["root"] == "0777"
    assert config.data.test == {"folder": "1e5"}
    again = Config.from_dict(config.to_dict())
    assert again.data == config.data
    assert DataConfig(val={"a": None, "b": {}}).val == {
        "a": {"part": "val"},
        "b": {"part": "val"},
    }


def test_what_a_sets_transforms_cannot_do_is_said_of_their_own_key() -> None:
    flip = {"name": "RandomHorizontalFlip", "p": 1.0}
    section = DataConfig(val={"moved": {"transforms": [flip]}})
    boxes = Shapes("val", 4, 32, "boxes")
    loaders = evaluation_loaders(
        section,
        Datasets(boxes, boxes, None, "x", named={"moved": boxes}),
        None,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    message = r"^val/moved sample 0: data\.val\.moved\.transforms: RandomH.* would move"
    with pytest.raises(DataError, match=message):
        loaders["val/moved"].fetch([0])


def test_predict_checks_images_by_a_set_with_the_transforms_that_it_uses() -> None:
    resize = {"name": "Resize", "size": [5, 5]}
    sets = {"small": {"transforms": [resize]}, "plain": {}}
    run = Trainer(Config.from_dict({"data": {"name": "digits", "val": sets}})).run
    assert run.signature.shape == [1, 8, 8]
    shapes = [tuple(item.loader.peek([0]).inputs.shape[2:]) for item in run.validation]
    assert shapes == [(5, 5), (8, 8)]


FAKE = {"name": "fake", "size": 60, "val_size": 20, "image_size": 8, "num_classes": 4}


def test_a_run_from_a_config_and_its_evaluation_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**changes: Any) -> dict[str, Any]:
        crop = {"name": "RandomCrop", "size": 8, "padding": 2}
        tree: dict[str, Any] = {
            "run": {"dir": str(tmp_path), "resume": "auto", "proof": "off"},
            "data": {
                **FAKE,
                "val": {"clean": {}, "moved": {"transforms": [crop]}},
                "test": {"val_size": 12},
                **changes,
            },
            "train": {"epochs": 2},
            "schedule": {"name": "constant"},
            "best": {"metric": "val/moved/accuracy"},
            "wandb": {"mode": "disabled"},
        }
        return Trainer(Config.from_dict(tree)).fit()

    summary = run()
    assert (tmp_path / "run" / "figures" / "confusion_matrix.png").is_file()
    row = json.loads((tmp_path / "run" / "best" / "metrics.json").read_text())
    assert row["val/moved/accuracy"] == summary["best"]
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run")])
    output = capsys.readouterr().out
    logged = {**row, **summary}
    for phase in ("val/clean", "val/moved", "test"):
        for name in (f"{phase}/loss", f"{phase}/accuracy"):
            value = f"{logged[name]:.6f}"
            assert f"{name}  {value}  (logged as {value})" in output
    assert "note" not in output

    with pytest.raises(ConfigError, match=r"data.val.moved.transforms was \["):
        run(val={"clean": {}, "moved": {"val_size": 3}})
    with pytest.raises(DataError, match=r"12 test samples were, 20 are"):
        run(test={"part": "val"})
    # A test set that comes later is evaluated, and nothing is trained for it.
    assert "test/loss" not in run(test=None)
    other = run(test={"part": "val"})
    assert other["weights_sha256"] == summary["weights_sha256"]
    assert other["test/loss"] == row["val/clean/loss"]


def test_a_bad_sample_of_one_set_is_left_out_of_that_set_alone(tmp_path: Path) -> None:
    def run(name: str) -> dict[str, Any]:
        root = tmp_path / name
        for number in range(1, 4):
            for part in ("train", "clean", "shifted"):
                picture(root / part / "ants" / f"{number}.png")
                picture(root / part / "bees" / f"b{number}.png")
        bad = root / "shifted" / "ants" / "2.png"
        bad.write_bytes(b"no image") if name == "damaged" else bad.unlink()
        tree: dict[str, Any] = {
            "run": {"dir": str(tmp_path / "runs"), "name": name, "figures": False},
            "data": {
                **{"name": "folder", "root": str(root), "bad_samples": "quarantine"},
                "val": {part: {"folder": part} for part in ("clean", "shifted")},
            },
            "train": {"max_steps": 1},
            "wandb": {"mode": "disabled"},
        }
        Trainer(Config.from_dict(tree)).fit()
        row = tmp_path / "runs" / name / "best" / "metrics.json"
        metrics: dict[str, Any] = json.loads(row.read_text())
        return metrics

    damaged, without = run("damaged"), run("without")
    for set_name in ("clean", "shifted"):
        loss = f"val/{set_name}/loss"
        assert damaged[loss] == pytest.approx(without[loss], rel=1e-6)
    assert damaged["val/clean/loss"] != damaged["val/shifted/loss"]
    listed = (tmp_path / "runs" / "damaged" / "bad_samples.txt").read_text()
    assert "val/shifted" in listed and "shifted/ants/2.png" in listed


def test_what_is_printed_of_an_average_that_was_best_is_what_was_logged_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {
        "run": {"dir": str(tmp_path), "proof": "off", "figures": False},
        "data": FAKE,
        "train": {"epochs": 1},
        "ema": {"decay": 0.9},
        "best": {"metric": "val_ema/loss", "mode": "min"},
        "wandb": {"mode": "disabled"},
    }
    Trainer(Config.from_dict(tree)).fit()
    row = json.loads((tmp_path / "run" / "best" / "metrics.json").read_text())
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run")])
    value = f"{row['val_ema/loss']:.6f}"
    assert f"val_ema/loss  {value}  (logged as {value})" in capsys.readouterr().out
