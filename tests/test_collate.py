"""How samples become batches, and how a model gets them: collate functions, columns, inputs by name, wrapped scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import config
from trainer import ConfigError, DataError, Trainer
from trainer.components.calling import call_model, scores_of
from trainer.components.small_models import small_detector
from trainer.components.task import CrossEntropy, Detection
from trainer.config.data_section import DataConfig
from trainer.core.build import build_run
from trainer.data.batches import Loaded, Request
from trainer.data.collation import build_collation, lists
from trainer.data.datasets import Datasets, build_datasets
from trainer.data.loading import build_loaders
from trainer.data.rows import as_pairs
from trainer.data.samples import KeyedDataset
from trainer.data.shapes import Shapes

HERE = "tests.test_collate"
PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
CPU = torch.device("cpu")


def batch_of(data: Any, ids: list[int] | None = None, **section: Any) -> Any:
    """A batch as the model would get it."""
    loader, _ = build_loaders(
        DataConfig(**section),
        Datasets(data, None, None, "data"),
        seed=0,
        device=CPU,
        dtype=torch.float32,
    )
    return loader.peek(ids or range(len(data)))


# ---------------------------------------------------------------- collate functions


def test_lists_keep_each_sample_and_normalise_each_image() -> None:
    large, small = Image.fromarray(PIXELS), PIXELS[:2]
    target = {"boxes": [[0, 0, 2, 2]], "labels": np.array([1])}
    data = [(large, target), (small, {"boxes": [], "labels": [], "file": "a.png"})]
    batch = batch_of(data, collate="lists", mean=[0.5], std=[0.25])
    assert batch.samples == 2
    first, second = batch.inputs
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1) * torch.tensor(1 / 255)
    assert torch.equal(first, (expected - 0.5) / 0.25)
    assert second.shape == (3, 2, 6)
    assert batch.targets[0]["boxes"].tolist() == [[0, 0, 2, 2]]
    assert batch.targets[1]["file"] == "a.png"


def draws(samples: list[Any]) -> tuple[Tensor, Tensor]:
    values = torch.stack([value for value, _ in samples]).double()
    return values + torch.rand(1), torch.tensor([target for _, target in samples])


def test_floats_get_the_runs_dtype_and_draws_are_keyed_by_the_batch() -> None:
    data = [(torch.zeros(2) + i, i) for i in range(6)]
    first, again = (batch_of(data, [3, 1], collate=f"{HERE}.draws") for _ in range(2))
    other = batch_of(data, [1, 3], collate=f"{HERE}.draws")
    assert first.inputs.dtype == torch.float32
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs.flip(0), other.inputs)


def fails(samples: list[Any]) -> Any:
    raise KeyError("mask")


def no_pair(samples: list[Any]) -> Any:
    return torch.zeros(2)


NOT_CALLABLE = 7


@pytest.mark.parametrize(
    ("name", "kind", "texts"),
    [
        ("fails", DataError, ["failed on the train samples 0, 1", "KeyError: 'mask'"]),
        ("no_pair", DataError, ["returned a Tensor (2,)", "a pair (inputs, targets)"]),
        ("NOT_CALLABLE", ConfigError, ["data.collate: ", "is int", "a function of a"]),
        ("Shapes", ConfigError, ["data.collate: ", "is a class"]),
        ("missing", ConfigError, ["data.collate: ", 'has no "missing"']),
    ],
)
def test_a_wrong_collate_is_one_message(name: str, kind: Any, texts: list[str]) -> None:
    data = [(torch.zeros(2), 0)] * 2
    with pytest.raises(kind) as caught:
        batch_of(data, collate=f"{HERE}.{name}")
    for text in texts:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


class Counting:
    """A collate function of a state of its own."""

    calls = 0

    @classmethod
    def collate(cls, samples: list[Any]) -> Any:
        cls.calls += 1
        return lists(samples) if cls.calls % 2 else lists(samples[::-1])


def test_the_proof_finds_one_that_depends_on_earlier_calls(tmp_path: Path) -> None:
    def run() -> list[Any]:
        trainer = Trainer(
            config(
                tmp_path,
                loss__name="detection",
                data__collate=f"{HERE}.Counting.collate",
                batch__size=4,
                batch__micro_size=2,
            ),
            model=small_detector(4, width=4, image_size=32),
            train_data=Shapes("train", 8, 40, "boxes", 0.3),
        )
        trainer.prove()
        return [str(finding) for finding in trainer.proof.findings]

    findings = on_ranks(1, run)[0]
    assert "data.collate=" in findings[0]
    assert "another input and target of the same samples each time" in findings[0]


# ---------------------------------------------------------------- rows


class HuggingFaceLike:
    """Rows with features, as `datasets.Dataset` gives them."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns
        kinds = {"img": "Image", "fine": "ClassLabel", "coarse": "ClassLabel"}
        self.features = {
            name: type(kinds.get(name, "Value"), (), {"names": ["ant", "bee"]})()
            for name in columns
        }

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


IMAGES = [Image.fromarray(PIXELS)] * 2


def test_columns_are_those_that_are_named_or_the_only_ones_of_their_kind() -> None:
    guessed = as_pairs(HuggingFaceLike(img=IMAGES, fine=[0, 1], id=[7, 8]), None)
    assert guessed[1][1] == 1 and guessed.classes == ["ant", "bee"]
    several = HuggingFaceLike(img=IMAGES, fine=[0, 1], coarse=[1, 0])
    assert as_pairs(several, None) is several
    with pytest.raises(
        DataError, match=r"is a row of img, fine, coarse.*data\.columns"
    ):
        batch_of(several)
    assert as_pairs(several, ["img", "coarse"])[0][1] == 1
    with pytest.raises(ConfigError, match=r'no column "label"; they have img, fine'):
        as_pairs(several, ["img", "label"])
    with pytest.raises(ConfigError, match="needs two"):
        as_pairs(several, ["img"])


def test_several_columns_are_inputs_by_name() -> None:
    data = HuggingFaceLike(
        ids=[[1, 2, 3], [4, 5, 6]], age=[0.5, 1.5], img=IMAGES, fine=[0, 1]
    )
    batch = batch_of(as_pairs(data, [["ids", "age", "img"], "fine"]))
    assert batch.inputs["ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch.inputs["age"].tolist() == [0.5, 1.5]
    assert batch.inputs["img"].shape == (2, 3, 4, 6)
    section = {"columns": [["img", "age"], "fine"]}
    scaled = batch_of(as_pairs(data, section["columns"]), **section)
    assert torch.equal(
        scaled.inputs["img"], batch.inputs["img"] * torch.tensor(1 / 255)
    )
    assert scaled.inputs["age"].dtype == torch.float32


def test_a_run_on_a_data_set_of_hugging_face_from_the_config(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["dark", "light"]),
        }
    )
    pixels = [np.full((8, 8, 3), 200 * (i % 2), np.uint8) for i in range(8)]
    rows = {
        "picture": [Image.fromarray(p) for p in pixels],
        "kind": [i % 2 for i in range(8)],
    }
    parts = {
        name: datasets.Dataset.from_dict(rows, features) for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    section = DataConfig(
        name="datasets.load_from_disk",
        args={"dataset_path": str(tmp_path / "saved")},
    )
    data = build_datasets(section, lambda: None)  # type: ignore[arg-type,return-value]
    assert data.classes == ["dark", "light"]
    assert data.val is not None and len(data.val) == 8

    def run() -> float:
        settings = config(
            tmp_path, batch__size=8, optimizer__lr=0.5, train__precision="fp32"
        )
        trainer = Trainer(settings, train_data=parts["train"], val_data=parts["test"])
        trainer.fit()
        return trainer.evaluate()["accuracy"]

    assert on_ranks(1, run)[0] == 1.0


# ---------------------------------------------------------------- the model's call


class ByName(nn.Module):
    def forward(self, image: Any, age: Any = None, **options: Any) -> Any:
        return image, age


class OneDict(nn.Module):
    def forward(self, batch: Any) -> Any:
        return batch


class AnyName(nn.Module):
    def forward(self, **inputs: Any) -> Any:
        return inputs


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (ByName(), {"image": 1, "age": 2}, (1, 2)),
        (ByName(), {"image": 1}, (1, None)),
        (ByName(), {"image": 1, "size": 2}, ({"image": 1, "size": 2}, None)),
        (ByName(), {}, ({}, None)),
        (OneDict(), {"image": 1, "age": 2}, {"image": 1, "age": 2}),
        (AnyName(), {"a": 1}, {"a": 1}),
        (OneDict(), [1, 2], [1, 2]),
    ],
)
def test_a_dict_goes_by_name_where_the_forward_has_every_name(
    model: nn.Module, inputs: Any, expected: Any
) -> None:
    assert call_model(model, inputs) == expected


@dataclass
class Output:
    logits: Tensor
    hidden_states: Any = None


class Wrapped(nn.Module):
    """Scores as transformers gives them, of an image and an age by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, image: Tensor, age: Tensor) -> Output:
        return Output(self.layer(torch.cat([image, age], 1)), (image,))


class OwnLoss(CrossEntropy):
    """As one had to write it before scores were unwrapped."""

    def loss_sum(self, output: Any, targets: Any) -> Any:
        return super().loss_sum(output.logits, targets)

    def metric_sums(self, output: Any, targets: Any) -> Any:
        return super().metric_sums(output.logits, targets)


@pytest.mark.parametrize("task", [None, OwnLoss()])
def test_wrapped_scores_of_several_inputs_train(tmp_path: Path, task: Any) -> None:
    def run() -> dict[str, float]:
        data = [
            ({"image": torch.randn(2).double(), "age": torch.ones(1).double()}, i % 2)
            for i in range(12)
        ]
        torch.manual_seed(0)
        trainer = Trainer(
            config(tmp_path, batch__size=6, batch__micro_size=3, train__epochs=1),
            model=Wrapped(),
            train_data=data,
            val_data=data,
            task=task,
        )
        trainer.fit()
        return trainer.evaluate()

    assert on_ranks(1, run)[0].keys() == {"loss", "accuracy"}


def test_scores_with_an_auxiliary_output_are_refused() -> None:
    scores = torch.zeros(2, 3)
    assert scores_of({"out": scores}) is scores
    assert scores_of(SimpleNamespace(logits=scores, loss=None)) is scores
    other = {"a": scores}
    assert scores_of(other) is other
    with pytest.raises(ConfigError, match=r'"aux" besides.*model\.aux_loss=false'):
        scores_of({"out": scores, "aux": scores})


# ---------------------------------------------------------------- detection


def test_boxes_meet_once_each_the_surest_first() -> None:
    task = Detection()
    target = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 0, 60, 10]]),
        "labels": torch.tensor([1, 2, 1]),
    }
    answer = {
        "boxes": torch.tensor(
            [
                [1.0, 0, 10, 10],  # meets the first
                [0, 0, 10, 10],  # which is then taken
                [20, 20, 30, 30],  # another class
                [50, 0, 60, 10],  # not sure enough
            ]
        ),
        "labels": torch.tensor([1, 1, 1, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.4]),
    }
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}
    sums = task.metric_sums([answer, answer], [target, none])
    assert [float(value) for value in sums["recall"]] == [1, 3]
    assert [float(value) for value in sums["precision"]] == [1, 6]
    # Losses are no answers.
    assert all(w == 0 for _, w in task.metric_sums({"a": torch.ones(())}, []).values())
    kept = task.answer([answer])
    assert kept is not None and kept.samples()[0].values.shape == (4, 6)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (torch.zeros(4), "a dict of boxes and labels"),
        ({"boxes": torch.zeros(2, 4)}, "a dict of boxes and labels"),
        ({"boxes": torch.zeros(2, 5), "labels": torch.zeros(2)}, "needs (K, 4)"),
        ({"boxes": torch.zeros(2, 4), "labels": torch.zeros(3)}, "needs (K, 4)"),
    ],
)
def test_targets_that_are_no_boxes_are_named(target: Any, text: str) -> None:
    with pytest.raises(DataError) as caught:
        Detection().convert_targets([torch.zeros(3, 4, 4)], [target])
    assert text in str(caught.value)


def test_a_model_without_losses_is_named(tmp_path: Path) -> None:
    def run() -> str:
        run = build_run(
            config(tmp_path, loss__name="detection"),
            model=nn.Identity(),
            train_data=Shapes("train", 4, 32, "boxes"),
        )
        with pytest.raises(ConfigError) as caught:
            run.task.loss_sum({"a": 1}, [])
        return str(caught.value)

    assert "a dict of losses in training" in on_ranks(1, run)[0]


def test_shapes_say_the_same_by_every_target() -> None:
    parts = {t: Shapes("train", 20, 48, t, 0.2) for t in ("boxes", "mask", "labels")}
    for index in range(20):
        image, target = parts["boxes"][index]
        _, mask = parts["mask"][index]
        _, labels = parts["labels"][index]
        assert image.shape[1:] == mask.shape
        assert set(target["labels"].tolist()) == set(mask.unique().tolist()) - {0}
        assert labels.tolist() == [float((mask == k).any()) for k in (1, 2, 3)]
        for box, label in zip(target["boxes"].int(), target["labels"], strict=True):
            x1, y1, x2, y2 = box.tolist()
            inside = mask[y1:y2, x1:x2] == label
            assert inside.any(0).all() and inside.any(1).all()
    with pytest.raises(IndexError):
        parts["mask"][20]


def test_build_collation_is_none_for_torchs_default() -> None:
    assert build_collation(None) is None


class OneBad:
    """Images of two sizes, one of which cannot be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        if index == 2:
            raise DataError("a.png is damaged")
        return torch.zeros(3, 4 + index, 4), {"boxes": [], "labels": []}


def test_a_bad_sample_is_left_out_of_a_batch_of_any_kind() -> None:
    keyed = KeyedDataset(
        OneBad(),
        None,
        seed=0,
        purpose="train",
        leaves_out=True,
        collation=build_collation("lists"),
    )
    loaded = keyed[Request(0, 0, np.arange(4))]
    assert isinstance(loaded, Loaded) and loaded.batch is not None
    assert [bad.id for bad in loaded.bad] == [2]
    assert loaded.batch.samples == len(loaded.batch.inputs) == 3
    assert [image.shape[1] for image in loaded.batch.inputs] == [4, 5, 7]


def test_mean_average_precision_takes_what_detection_gives() -> None:
    pytest.importorskip("pycocotools")
    detection = pytest.importorskip("torchmetrics.detection")
    task = Detection()
    target = {"boxes": torch.tensor([[0, 0, 10, 10]]), "labels": torch.tensor([1])}
    answer = {
        "boxes": torch.tensor([[0.0, 0, 10, 10]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.9]),
    }
    inputs = task.metric_inputs([answer], [target])
    assert inputs is not None
    metric = detection.MeanAveragePrecision()
    metric.update(*inputs)
    assert float(metric.compute()["map"]) == pytest.approx(1.0)
    assert task.metric_inputs({"loss": torch.ones(())}, [target]) is None
