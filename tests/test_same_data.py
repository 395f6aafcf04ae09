"""Data read again: a resume, `evaluate` and `replay` see what changed since the run, and say it by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from tests.distributed.small import Points, config, mlp
from trainer import Config, Trainer
from trainer.commands import evaluate
from trainer.data.classes import with_classes
from trainer.data.datasets import Datasets, ImageArrays
from trainer.errors import ConfigError, DataError
from trainer.inspection.replay import replay
from trainer.storage.data_record import describe_changes, record_data, write_record
from trainer.storage.fingerprint import fingerprint
from trainer.sweep.description import read_sweep
from trainer.sweep.same_data import describe_other_data

# A deprecated decoder would be called.
pytestmark = pytest.mark.filterwarnings(
    "error:The image decoding and encoding:DeprecationWarning"
)

COLOURS = {
    "ant": (0, 255, 255),
    "bee": (255, 0, 0),
    "cat": (0, 255, 0),
    "dog": (0, 0, 255),
}


def images(root: Path, *classes: str, count: int = 4) -> Path:
    """`count` images of one colour for each class, in train/ and in val/."""
    for part in ("train", "val"):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = Image.new("RGB", (8, 8), COLOURS[name])
                image.save(folder / f"{index}.png")
    return root


def of_folder(directory: Path, root: Path, **changes: Any) -> Config:
    return config(
        directory,
        data__name="folder",
        data__root=str(root),
        batch__size=6,
        optimizer__lr=0.05,
        train__precision="fp32",
        best__metric="val/accuracy",
        best__mode="max",
        **changes,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on bees, cats and dogs that tells them apart by colour."""
    directory = tmp_path_factory.mktemp("trained")
    root = images(directory / "images", "bee", "cat", "dog")
    Trainer(of_folder(directory, root, train__epochs=3)).fit()
    return directory / "run"


@pytest.mark.parametrize("classes", [("cat", "dog"), ("dog",), ("bee", "cat", "dog")])
def test_evaluate_matches_classes_by_name(
    trained: Path, tmp_path: Path, classes: tuple[str, ...], capsys: Any
) -> None:
    root = images(tmp_path, *classes)
    evaluate.main([str(trained), f"data.root={root}"])
    output = capsys.readouterr().out
    assert "val/accuracy  1.000000" in output
    assert ("not the data that the run was validated on" in output) is (
        len(classes) < 3
    )


def test_evaluate_refuses_a_class_that_the_model_does_not_know(
    trained: Path, tmp_path: Path
) -> None:
    root = images(tmp_path, "ant", "bee", "cat")
    with pytest.raises(ConfigError) as caught:
        evaluate.main([str(trained), f"data.root={root}"])
    assert str(caught.value).startswith(
        "data.root: the data have the class ant, which the model was not trained on; it knows bee, cat, dog"
    )


def test_weights_of_a_run_on_other_classes_are_said_to_be(
    trained: Path, tmp_path: Path, capsys: Any
) -> None:
    root = images(tmp_path / "images", "ant", "cat", "dog")
    best = trained / "best/model.safetensors"
    changes = {"train__epochs": 1, "model__weights": str(best)}
    Trainer(of_folder(tmp_path, root, **changes)).fit()
    output = " ".join(capsys.readouterr().out.split())
    assert "its head is for bee, cat, dog, not for ant, cat, dog" in output
    Trainer(of_folder(tmp_path, trained.parent / "images", **changes)).fit()
    assert "its head is for" not in capsys.readouterr().out


class Attributes:
    """A data set whose samples are known by one attribute."""

    def __init__(self, values: Any, root: Any = None) -> None:
        self.values = values
        self.root = root
        self.cache: list[Any] = [None] * len(values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.values[index], 0


class Labelled(Attributes):
    """A data set of one's own, with class names."""

    def __init__(self, labels: list[Any], *classes: str) -> None:
        super().__init__(labels)
        self.classes = classes

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return torch.zeros(1), self.values[index]


def test_class_ids_of_every_kind_of_data_are_matched_by_name() -> None:
    known = ["bee", "cat", "cafe\u0301"]
    names = ["caf\u00e9", "bee"]
    arrays = ImageArrays(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 0]))
    own = Labelled([0, torch.tensor(1), np.int64(0)], *names)
    for dataset in (arrays, own):
        data = with_classes(Datasets(dataset, dataset, names, "x"), known)
        assert data.val is not None
        assert [data.val[index][1] for index in range(3)] == [2, 0, 2]
        assert data.classes == known
    same = Datasets(own, None, names, "x")
    assert with_classes(same, names) is same
    soft = Labelled([torch.tensor([0.5, 0.5])], *names)
    with pytest.raises(DataError, match="sample 0: its target is no class id"):
        with_classes(Datasets(soft, None, names, "x"), known).train[0]
    with pytest.raises(ConfigError, match="class names are not unique"):
        with_classes(same, [*known, "bee"])


def test_evaluate_names_the_first_file_that_is_another(
    trained: Path, tmp_path: Path, capsys: Any
) -> None:
    root = images(tmp_path, "bee", "cat", "dog")
    shutil.copy(root / "val/cat/0.png", root / "val/cat/00.png")
    evaluate.main([str(trained), f"data.root={root}"])
    assert (
        "12 val samples were, 13 are (cat 4 → 5), from sample 5 (val/cat/00.png) on"
        in capsys.readouterr().out
    )


def add_file(root: Path) -> None:
    shutil.copy(root / "train/cat/0.png", root / "train/cat/z.png")


def replace_file(root: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "val/cat/2.png")


def rename_class(root: Path) -> None:
    for part in ("train", "val"):
        (root / part / "cat").rename(root / part / "cow")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            add_file,
            "12 train samples were, 13 are (cat 4 → 5), from sample 8 (train/cat/z.png) on",
        ),
        (
            replace_file,
            "12 val samples as before, of other content or classes, from sample 6 (val/cat/2.png) on",
        ),
        (rename_class, 'class 1 was "cat" and is "cow"'),
    ],
)
def test_a_resume_refuses_other_data_unless_it_is_allowed(
    trained: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
    capsys: Any,
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    root = tmp_path / "images"
    shutil.copytree(trained.parent / "images", root)
    more = {"train__epochs": 4, "run__resume": "auto"}
    # Elsewhere on the disk, and so allowed to be: what the files hold is compared next.
    moved = {"run__resume_changes": "allow"}
    Trainer(of_folder(tmp_path, root, **more, **moved)).fit()
    assert "have changed" not in capsys.readouterr().out
    change(root)
    with pytest.raises(DataError) as caught:
        Trainer(of_folder(tmp_path, root, **more | {"train__epochs": 5})).fit()
    assert message in str(caught.value)
    assert "run.resume_changes=allow" in str(caught.value)
    summary = Trainer(
        of_folder(tmp_path, root, **more | {"train__epochs": 5}, **moved)
    ).fit()
    assert "the data have changed since the run began: " in capsys.readouterr().out
    assert summary["steps"] > 6


def relabelled() -> Points:
    data = Points(ignored=False)
    data.labels[17] = (data.labels[17] + 1) % 4
    return data


def test_replay_refuses_other_data_and_other_weights(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(mlp().state_dict(), weights)
    settings = config(tmp_path, model__weights=str(weights), train__epochs=1)
    data = Points(ignored=False)

    def make(train: Points) -> Trainer:
        return Trainer(settings, model=mlp(), train_data=train, val_data=data)

    make(data).fit()
    assert replay(lambda: make(data), tmp_path / "run", 1).step == 1
    with pytest.raises(DataError) as caught:
        replay(lambda: make(relabelled()), tmp_path / "run", 1)
    assert "103 train samples as before" in str(caught.value)
    assert "from sample 17 on" in str(caught.value)

    torch.save(nn.Sequential(*mlp()).double().state_dict(), weights)
    with pytest.raises(DataError, match=r"weights\.pt is not the file that the run"):
        replay(lambda: make(data), tmp_path / "run", 1)


def test_a_sweep_says_that_its_trials_read_other_data(tmp_path: Path) -> None:
    description = {
        "program": "train.py",
        "name": "small",
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": ["${program}", "${args_no_hyphens}"],
    }
    notes = []
    for name in ("optimizer.lr", "data.size"):
        file = tmp_path / f"{name}.yaml"
        parameters = {name: {"values": [1, 2]}}
        file.write_text(yaml.safe_dump({**description, "parameters": parameters}))
        notes.append(partial(describe_other_data, read_sweep(file), tmp_path))
    for number, data in enumerate([Points(), Points(), Points(ignored=False)]):
        run = tmp_path / f"small-{number:03d}"
        run.mkdir()
        write_record(run, record_data(Datasets(data, None, None, "x")))
        if number == 1:
            assert notes[0]() == ""
    assert notes[0]() == (
        "the data changed between trials, so their values do not compare: those of small-002 are not those of "
        "small-000"
    )
    assert notes[1]() == ""


def changed(values: Any, index: int, value: Any) -> Any:
    copy = values.clone() if isinstance(values, torch.Tensor) else values.copy()
    copy[index] = value
    return copy


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda new: Attributes(changed(torch.zeros(9, 2), 5, new)), 5),
        (lambda new: Attributes(changed(np.zeros((9, 2)), 5, new)), 5),
        (lambda new: Attributes(changed([("a", 0)] * 9, 5, ("a", new))), 5),
        (
            lambda new: Attributes([torch.zeros(i) + (i == 5) * new for i in range(9)]),
            5,
        ),
        (lambda new: TensorDataset(torch.zeros(9), changed(torch.zeros(9), 5, new)), 5),
        (lambda new: Subset(Attributes(changed(list(range(9)), 5, new)), [8, 5, 1]), 1),
        (lambda new: [(torch.zeros(2) + (i == 5) * new, i) for i in range(9)], 5),
        # Not sample by sample, but as a whole.
        (lambda new: ConcatDataset([Subset(Attributes([0, new]), [0, 1])] * 2), 0),
    ],
)
def test_a_fingerprint_sees_every_attribute_of_the_samples(
    make: Callable[[int], Any], first: int
) -> None:
    before, now = make(6), make(7)
    assert fingerprint(before) == fingerprint(make(6))
    record = record_data(Datasets(before, None, None, "x"))
    assert describe_changes(record, Datasets(make(6), None, None, "x")) == ""
    text = describe_changes(record, Datasets(now, None, None, "x"))
    assert text.endswith(f"from sample {first} on")


def test_a_first_difference_among_many_is_found_within_a_block() -> None:
    values = torch.zeros(5000)
    record = record_data(Datasets(Attributes(values), None, None, "x"))
    now = Datasets(Attributes(changed(values, 4321, 1)), None, None, "x")
    assert "from between samples 4320 and 4327 on" in describe_changes(record, now)
    shorter = Datasets(Attributes(values[:4096]), None, None, "x")
    assert describe_changes(record, shorter) == (
        "5,000 train samples were, 4,096 are, the last are missing"
    )


def test_a_path_counts_without_the_root_it_lies_in() -> None:
    here = Attributes(["/here/a.png", "/here/b.png"], "/here")
    there = Attributes(["/there/a.png", "/there/b.png"], "/there")
    other = Attributes(["/there/a.png", "/there/c.png"], "/there")
    assert fingerprint(here) == fingerprint(there) != fingerprint(other)


@pytest.mark.parametrize(
    ("names", "is_refused"),
    [("abcd", False), ("abc", False), ("acbd", True), ("bcd", True)],
)
def test_validation_data_that_name_their_classes_otherwise(
    tmp_path: Path, names: str, is_refused: bool
) -> None:
    train, val = Points(ignored=False), Points(ignored=False)
    val.classes = tuple(names)
    if not is_refused:
        Trainer(config(tmp_path), model=mlp(), train_data=train, val_data=val)
        return
    with pytest.raises(ConfigError, match=r'class [01] is "[ab]" in the training data'):
        Trainer(config(tmp_path), model=mlp(), train_data=train, val_data=val)
