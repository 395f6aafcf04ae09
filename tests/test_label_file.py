"""Data as people have it: one folder that is split, folders of other names, and label files."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import StratifiedShuffleSplit
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.distributed.ranks import on_ranks
from tests.distributed.small import state
from trainer import Config, ConfigError, Trainer
from trainer.data.classes import with_classes
from trainer.data.datasets import Datasets, build_datasets
from trainer.data.evaluation_sets import with_evaluation_sets
from trainer.data.split import split_ids, with_split
from trainer.errors import DataError
from trainer.storage.data_record import describe_changes, record_data


def images(root: Path, *paths: str) -> None:
    for index, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (index * 9 % 256, 60, 90)).save(root / path)


def datasets(**section: Any) -> Datasets:
    config = Config.from_dict({"data": {"name": "folder", **section}}).data
    return with_split(config, build_datasets(config, nullcontext))


def refused(kind: type[Exception], **section: Any) -> str:
    with pytest.raises(kind) as caught:
        datasets(**section)
    return str(caught.value)


# ---------------------------------------------------------------- splits


def test_each_class_gives_its_share() -> None:
    draw = np.random.default_rng(0)
    for _ in range(60):
        labels = draw.integers(0, int(draw.integers(1, 9)), int(draw.integers(2, 90)))
        fraction, seed = float(draw.uniform(0.05, 0.95)), int(draw.integers(99))
        train, val = split_ids(len(labels), labels, fraction, seed)
        assert sorted([*train, *val]) == list(range(len(labels)))
        assert list(train) == sorted(train) and list(val) == sorted(val)
        counts = Counter(labels.tolist())
        is_single = all(count == 1 for count in counts.values())
        of_val, of_train = Counter(labels[val].tolist()), Counter(labels[train])
        for label, count in counts.items():
            share = len(val) * count / len(labels)
            assert is_single or of_train[label] >= 1
            # One more or less than its share, unless a class had to keep its only sample.
            if all(other > 3 for other in counts.values()) and 0.1 < fraction < 0.7:
                assert abs(of_val[label] - share) < 1
        if min(counts.values()) > 20:
            assert len(val) == round(fraction * len(labels))
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    _, val = split_ids(100, labels, 0.2, 0)
    ((_, expected),) = StratifiedShuffleSplit(1, test_size=0.2, random_state=0).split(
        labels, labels
    )
    assert Counter(labels[val]) == Counter(labels[expected])
    again, other = split_ids(100, labels, 0.2, 0)[1], split_ids(100, labels, 0.2, 1)[1]
    assert list(val) == list(again) != list(other)
    # As drawn once: a resume, and any other machine, must find the same samples.
    assert split_ids(10, None, 0.3, 5)[1].tolist() == [2, 3, 6]
    assert split_ids(3, np.arange(3), 0.5, 0)[1].size == 2


def test_one_folder_is_split(tmp_path: Path) -> None:
    names = [f"{c}/{i}.png" for c in ("ant", "bee") for i in range(10)]
    images(tmp_path, *names)
    data = datasets(root=str(tmp_path), val_fraction=0.3, cache=1e-6)
    train, val = data.train, data.val
    assert data.classes == ["ant", "bee"] and val is not None
    assert sorted([*train.paths, *val.paths]) == names  # type: ignore[attr-defined]
    assert Counter(val.targets) == {0: 3, 1: 3}  # type: ignore[attr-defined]
    for part in (train, val):
        # Cached images are of the paths that they stand beside.
        for index, path in enumerate(part.paths):  # type: ignore[attr-defined]
            expected = np.array(Image.open(tmp_path / path)).transpose(2, 0, 1)
            image, target = part[index]
            assert image.tolist() == expected.tolist()
            assert data.classes[target] == path.split("/")[0]
    assert data.note == (
        "validation is 6 of the 20 training samples, the same share of each class (data.val_fraction=0.3, "
        "data.split_seed=0)"
    )
    other = datasets(root=str(tmp_path), val_fraction=0.3, split_seed=1)
    assert other.val.paths != val.paths  # type: ignore[union-attr, attr-defined]
    assert describe_changes(record_data(data), other).startswith("14 train samples as")
    # A folder for training below it, and a validation folder that is not read.
    below = tmp_path / "below"
    images(below, *(f"train/{name}" for name in names), "val/broken/x.png")
    data = datasets(root=str(below), val_fraction=0.5)
    assert len(data.train) == len(data.val or []) == 10
    assert data.train.paths[0].startswith("train/ant/")  # type: ignore[attr-defined]


def test_names_of_the_folders(tmp_path: Path) -> None:
    images(tmp_path, "Train/ant/1.png", "Train/bee/1.png", "sets/test/bee/7.png")
    section = {"root": str(tmp_path), "train_folder": "Train"}
    data = datasets(**section, val_folder="sets/test")
    assert data.val.paths == ["sets/test/bee/7.png"]  # type: ignore[union-attr, attr-defined]
    assert data.val[0][1] == 1  # type: ignore[index]
    assert "val is missing; data.root must hold" in refused(DataError, **section)
    message = refused(ConfigError, **section, val_folder="../other")
    assert message == 'data.val_folder: "../other" is no folder below data.root'
    for fraction in (0, 1, 1.5):
        message = refused(ConfigError, **section, val_fraction=fraction)
        assert message == f"data.val_fraction: {fraction:g} is not above 0 and below 1"


@pytest.mark.parametrize("known", [True, False])
def test_a_data_set_of_ones_own_is_split(known: bool) -> None:
    points, labels = torch.arange(40.0).reshape(20, 2), torch.arange(20) % 4
    plain: Any = TensorDataset(points, labels)
    if known:
        plain.targets = labels
    section = Config.from_dict({"data": {"val_fraction": 0.4}}).data
    data = with_split(section, Datasets(plain, None, None, "own"))
    assert data.val is not None and len(data.val) == 8 and len(data.train) == 12
    if known:
        assert Counter(int(y) for _, y in data.val) == dict.fromkeys(range(4), 2)  # type: ignore[attr-defined]
    assert ("whatever their classes" in data.note) != known
    found = sorted(float(x[0]) for part in (data.train, data.val) for x, _ in part)  # type: ignore[attr-defined]
    assert found == points[:, 0].tolist()


def test_in_memory_sets_lose_their_own_validation_part() -> None:
    section = {"name": "digits", "val_fraction": 0.25, "root": None}
    data = datasets(**section)
    assert (len(data.train), len(data.val or [])) == (1079, 360)
    assert data.note.endswith(
        "the 358 validation samples of digits itself are not used"
    )
    assert len(datasets(name="fake", size=40, val_fraction=0.5).val or []) == 20


# ---------------------------------------------------------------- label files

HEAD = "path,label,split\n"
PATHS = ("a/1.png", "a/2.png", "b/3.png", "b/4.png")


def write(root: Path, text: str, name: str = "labels.csv") -> str:
    images(root, *PATHS)
    (root / name).write_text(text)
    return str(root)


def targets(part: Any) -> list[Any]:
    return [part[index][1] for index in range(len(part))]


def test_classes_of_a_label_file(tmp_path: Path) -> None:
    text = (
        "\ufeffpath, label,split\nb/3.png,10,val\na/1.png,9,train\n\n"
        '"a/2.png",10,train\nb/4.png,9,holdout\n'
    )
    data = datasets(root=write(tmp_path, text), labels="labels.csv")
    # Sorted by path, whatever the order of rows; classes by number, if they are numbers.
    assert data.train.paths == ["a/1.png", "a/2.png"]  # type: ignore[attr-defined]
    assert data.classes == ["9", "10"]
    assert targets(data.train) == [0, 1] and targets(data.val) == [1]
    assert data.note == 'rows of labels.csv left out: 1 of "holdout"'
    before = record_data(data)
    (tmp_path / "labels.csv").write_text(
        text.replace("a/1.png,9", "a/1.png,10", 1).replace('a/2.png",10', 'a/2.png",9')
    )
    now = datasets(root=str(tmp_path), labels="labels.csv")
    assert "train samples as before, of other content or classes" in describe_changes(
        before, now
    )


def test_other_columns_splits_and_a_fraction(tmp_path: Path) -> None:
    text = "file\tbreed\tpart\n" + "".join(f"{p}\t{p[0]}\tA\n" for p in PATHS)
    root = write(tmp_path, text, "l.tsv")
    labels = {"file": "l.tsv", "path": "file", "label": "breed"}
    data = datasets(root=root, labels=labels, val_fraction=0.5)
    assert targets(data.train) == targets(data.val) == [0, 1]
    split = {**labels, "split": "part", "train": "A", "val": "B"}
    (tmp_path / "l.tsv").write_text(text.replace("b/4.png\tb\tA", "b/4.png\tb\tB"))
    data = datasets(root=root, labels=split)
    assert (targets(data.train), targets(data.val)) == ([0, 0, 1], [1])


def test_several_labels_and_values(tmp_path: Path) -> None:
    text = (
        "path,label,x,y,split\na/1.png,cat;dog,1,0,train\na/2.png,,0,1,train\n"
        "b/3.png,dog; owl,1,1,train\nb/4.png,owl,0,0,val\n"
    )
    root = write(tmp_path, text)
    labels: dict[str, Any] = {"file": "labels.csv", "kind": "classes"}
    data = datasets(root=root, labels=labels)
    assert data.classes == ["cat", "dog", "owl"]
    assert torch.stack(targets(data.train)).tolist() == [
        [1, 1, 0],
        [0, 0, 0],
        [0, 1, 1],
    ]
    # For a model that knows other classes too, they are its own.
    renamed = with_classes(data, ["owl", "ape", "dog", "cat"])
    assert targets(renamed.val)[0].tolist() == [1, 0, 0, 0]
    assert targets(renamed.train)[0].tolist() == [0, 0, 1, 1]
    columns = datasets(root=root, labels={**labels, "label": ["x", "y"]})
    assert columns.classes == ["x", "y"]
    assert torch.stack(targets(columns.train)).tolist() == [[1, 0], [0, 1], [1, 1]]
    value = datasets(root=root, labels={**labels, "kind": "value", "label": "y"})
    assert value.classes is None and targets(value.train) == [0.0, 1.0, 1.0]
    several = {**labels, "kind": "value", "label": ["y", "x"]}
    (first, *_) = targets(datasets(root=root, labels=several).train)
    assert first.tolist() == [0, 1] and first.dtype == torch.float64


@pytest.mark.parametrize(
    ("text", "labels", "kind", "message"),
    [
        (
            "path,label\na/1.png,x\n",
            {},
            ConfigError,
            "data.val_fraction: {file} does not say which images",
        ),
        (
            "path,labels\na/1.png,x\n",
            {},
            ConfigError,
            'data.labels.label: {file} has no column "label"; its first ',
        ),
        (
            HEAD + "a/1.png,x,train\n",
            {},
            ConfigError,
            'data.labels.val: no row of {file} is of "val"; it has train',
        ),
        (
            HEAD + "a/1.png,x,train\na/2.png,y,val\n",
            {},
            DataError,
            "{file}, line 3: no training image has the label y",
        ),
        (
            "path,label,split\na/9.png,x,train\n",
            {},
            DataError,
            "{file}, line 2: there is no {root}/a/9.png; pa",
        ),
        (
            HEAD + "a/1.txt,x,train\n",
            {},
            DataError,
            '{file}, line 2: "a/1.txt" is no image of a type',
        ),
        (
            HEAD + "a/1.png,x\n",
            {},
            DataError,
            "{file}, line 2: 2 entries, and 3 columns",
        ),
        (
            HEAD + "a/1.png,x,train\n./a/1.png,y,val\n",
            {},
            DataError,
            "{file}, line 3: a/1.png stands in line 2",
        ),
        (
            HEAD + "a/1.png,x;y,train\na/2.png,x,val\n",
            {},
            DataError,
            "{file}, line 2: a/1.png has 2 labels",
        ),
        (
            HEAD + "a/1.png,x,train\na/2.png,2,val\n",
            {"kind": "value"},
            DataError,
            '{file}, line 2: "x" is no number',
        ),
        (
            "",
            {"kind": "clases"},
            ConfigError,
            "data.labels.kind: clases is not one of class, cl",
        ),
        (
            "",
            {"kid": 1},
            ConfigError,
            'data.labels.kid: no such key; did you mean "kind"?',
        ),
        (
            "",
            {"label": ["a"]},
            ConfigError,
            "data.labels.label: is a list, and a class stands in one column",
        ),
        (
            "",
            {"val": "train"},
            ConfigError,
            'data.labels.val: "train" is data.labels.train too',
        ),
        (
            "",
            {"file": "other.csv"},
            DataError,
            "data.labels={root}/other.csv cannot be read (No such file",
        ),
        (
            "",
            {"file": 3},
            ConfigError,
            "data.labels: {{file: 3}} is neither a CSV file nor a mapping",
        ),
    ],
)
def test_a_mistake_in_a_label_file_is_one_message(
    text: str,
    labels: dict[str, Any],
    kind: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    root = write(tmp_path, text)
    given = {"file": "labels.csv", **labels}
    expected = message.format(file=tmp_path / "labels.csv", root=tmp_path)
    assert refused(kind, root=root, labels=given).startswith(expected)


def test_sets_of_other_label_files(tmp_path: Path) -> None:
    root = write(tmp_path, "path,label\na/1.png,x\na/2.png,y\n")
    (tmp_path / "test.csv").write_text("path,label\nb/3.png,y\nb/4.png,x\n")
    (tmp_path / "parts.csv").write_text(f"{HEAD}b/3.png,y,val\nb/4.png,z,train\n")
    section: dict[str, Any] = {
        "root": root,
        "labels": "labels.csv",
        "val": {"all": {"labels": "test.csv"}, "part": {"labels": "parts.csv"}},
    }

    def sets(**changes: Any) -> Datasets:
        tree = {"name": "folder", **section, **changes}
        config = Config.from_dict({"data": tree}).data
        data = with_split(config, build_datasets(config, nullcontext))
        return with_evaluation_sets(config, data, nullcontext)

    data = sets()
    assert targets(data.named["all"]) == [1, 0]
    assert targets(data.named["part"]) == [1]
    assert data.note == "data.val.part: 1 rows of parts.csv left out"
    # A part of one's own training data beside a file.
    data = sets(val_fraction=0.5, val={"own": {}}, test={"labels": "test.csv"})
    assert (len(data.train), len(data.named["own"])) == (1, 1)
    assert targets(data.test) == [1, 0]
    with pytest.raises(ConfigError, match=r"data\.test\.labels\.kind: a is not one of"):
        sets(test={"labels": {"file": "test.csv", "kind": "a"}})
    # Names of folders hold for sets elsewhere too.
    for place in ("here", "there"):
        images(tmp_path / place, "a/x/1.png", "b/x/2.png")
    folders = {"labels": None, "train_folder": "a", "val_folder": "b"}
    elsewhere = {"shifted": {"root": str(tmp_path / "there")}, "own": {}}
    data = sets(root=str(tmp_path / "here"), val=elsewhere, **folders)
    assert data.named["shifted"].paths == ["b/x/2.png"]  # type: ignore[attr-defined]


# ---------------------------------------------------------------- runs


class Net(nn.Module):
    def __init__(self, num_classes: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x.flatten(1))
        return result


def trained(
    directory: Path, root: Path, **changes: Any
) -> tuple[dict[str, Tensor], Any]:
    tree: dict[str, Any] = {
        "run": {
            "dir": str(directory),
            "reproducibility": "bitwise",
            "resume": "auto",
            "figures": False,
        },
        "data": {
            "name": "folder",
            "root": str(root),
            "labels": {"file": "l.csv", "kind": "classes"},
            "val_fraction": 0.3,
        },
        "batch": {"size": 10, "micro_size": 3},
        "model": {"name": f"{__name__}.Net"},
        "loss": {"name": "bce_with_logits"},
        "train": {"epochs": 2},
        "wandb": {"mode": "disabled"},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree[section][key] = value
    trainer = Trainer(Config.from_dict(tree))
    trainer.fit()
    run = trainer.run
    assert run.data.val is not None
    return state(trainer), (run.data.val.paths, run.evaluate())  # type: ignore[attr-defined]


def test_a_split_label_file_on_any_processes(tmp_path: Path) -> None:
    paths = [f"{i}.png" for i in range(30)]
    images(tmp_path, *paths)
    names = ["a", "b", "a;b", ""]
    rows = [f"{path},{names[i % 4]}\n" for i, path in enumerate(paths)]
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(rows))
    ((reference, seen),) = on_ranks(
        1, trained, tmp_path / "1", tmp_path, run__figures=True
    )
    on_ranks(2, trained, tmp_path / "cut", tmp_path, train__max_steps=3)
    for result, of_rank in on_ranks(3, trained, tmp_path / "cut", tmp_path):
        assert all(torch.equal(result[name], reference[name]) for name in result)
        assert of_rank == seen
    value = {"file": "v.csv", "kind": "value"}
    numbers = [f"{path},{i / 30}\n" for i, path in enumerate(paths)]
    (tmp_path / "v.csv").write_text("path,label\n" + "".join(numbers))
    of_value = {"data__labels": value, "loss__name": "mse", "run__figures": True}
    on_ranks(1, trained, tmp_path / "value", tmp_path, **of_value)
    # A resume on other labels, or another split, is refused by name.
    (tmp_path / "l.csv").write_text(
        "path,label\n" + "".join(rows[::-1]).replace("\n5.png,b\n", "\n5.png,a\n")
    )
    with pytest.raises(
        AssertionError, match="train samples as before, of other content"
    ):
        on_ranks(1, trained, tmp_path / "cut", tmp_path)
    with pytest.raises(AssertionError, match=r"data\.split_seed was 0 and is 1"):
        on_ranks(1, trained, tmp_path / "1", tmp_path, data__split_seed=1)
