"""What detectors and models of several inputs answer: for files, in Python, in figures, and as exported programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.io import write_png

from examples.sequences.data import Waves
from tests.distributed.ranks import on_ranks
from tests.distributed.small import config
from trainer import ConfigError, Trainer
from trainer.commands.predict_output import print_predictions
from trainer.components.small_models import small_detector
from trainer.config.load import load
from trainer.data.shapes import Shapes
from trainer.inspection.export import export
from trainer.inspection.predictor import Predictor

SHORT = ["wandb.mode=disabled", "train.epochs=1", "train.max_steps=2"]


class TwoInputs(nn.Module):
    """Scores of an image and a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 2)

    def forward(self, image: Tensor, age: Tensor) -> Tensor:
        return self.layer(torch.cat([image.flatten(1), age[:, None]], 1))


class Pooled(nn.Module):
    """The scores of padded sequences' own steps, averaged."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 3)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        is_own = torch.arange(values.shape[1]) < lengths[:, None]
        scores = self.layer(values).tanh() * is_own[..., None]
        return scores.sum(1) / lengths[:, None]


class OneInput(nn.Module):
    """As models of transformers take an image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layer(pixel_values.flatten(1))


def rows(*names: str) -> list[tuple[dict[str, Any], int]]:
    draw = torch.Generator().manual_seed(0)
    data = []
    for index in range(6):
        values = {
            "image": torch.rand(1, 2, 2, generator=draw),
            "pixel_values": torch.rand(1, 2, 2, generator=draw),
            "age": torch.tensor(float(index)),
        }
        data.append(({name: values[name] for name in names}, index % 2))
    return data


def trained(directory: Path, model: nn.Module, data: Any, **changes: Any) -> None:
    settings = config(
        directory,
        batch__size=4,
        train__max_steps=2,
        **{"train__precision": "fp32", **changes},
    )
    Trainer(settings, model=model, train_data=data, val_data=data).fit()


def program_of(path: Path) -> tuple[Any, dict[str, Any]]:
    files = {"signature.json": "", "answer.json": "", "classes.json": ""}
    exported = torch.export.load(path, extra_files=files)
    return exported.module(), json.loads(files["signature.json"])


# ---------------------------------------------------------------- boxes


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, and its first validation images as files of many sizes."""
    root = tmp_path_factory.mktemp("detector")

    def run() -> None:
        overrides = ["batch.size=4", "batch.micro_size=2", "data.size=8"]
        overrides += ["data.val_size=5", "model.width=4", f"run.dir={root}"]
        Trainer(load(Path("configs/tasks/detection.yaml"), [*SHORT, *overrides])).fit()

    on_ranks(1, run)
    (root / "images").mkdir()
    data = Shapes("val", 5, 64, "boxes", 0.25)
    for index in range(5):
        write_png(data[index][0], str(root / "images" / f"{index}.png"))
    return root


def direct(predictor: Predictor, image: Tensor) -> Tensor:
    """The boxes that the model itself gives for one image."""
    with torch.no_grad():
        [answer] = predictor.module([image.float() * torch.tensor(1 / 255)])
    scores, labels = answer["scores"][:, None], answer["labels"][:, None].float()
    return torch.cat([answer["boxes"], scores, labels], 1)


def test_boxes_in_files_of_many_sizes(
    detector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = Predictor(detector / "detection")
    assert predictor.signature.form == "list"
    files = sorted((detector / "images").iterdir())
    print_predictions(predictor, files, top=3, as_json=True, masks=None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    data = Shapes("val", 5, 64, "boxes", 0.25)
    assert any(line["boxes"] for line in lines)
    for index, line in enumerate(lines):
        expected = direct(predictor, data[index][0])
        assert len(line["boxes"]) == len(expected)
        for found, row in zip(line["boxes"], expected.tolist(), strict=True):
            *box, score, class_id = row
            assert found["box"] == pytest.approx(box, rel=1e-4, abs=1e-3)
            assert found["score"] == pytest.approx(score, rel=1e-4)
            assert found["class_id"] == int(class_id)
            assert found["class"] in ("square", "disc", "cross")
    print_predictions(predictor, files, top=3, as_json=False, masks=None)
    assert "objects, the surest first" in capsys.readouterr().out


def test_an_exported_detector_finds_the_same_boxes(
    detector: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")

    def run() -> tuple[Tensor, Tensor, Any, bool]:
        import onnxruntime
        from torchvision.ops import boxes

        predictor = Predictor(detector / "detection")
        before = boxes.batched_nms
        # Which traces the same program as torch's own format.
        path = export(predictor, "onnx", tmp_path / "best.onnx")
        session = onnxruntime.InferenceSession(str(path))
        metadata = session.get_modelmeta().custom_metadata_map
        image, _ = Shapes("val", 5, 64, "boxes", 0.25)[0]
        [table] = session.run(["boxes"], {"image": image.numpy()})
        is_restored = boxes.batched_nms is before
        expected = direct(predictor, image)
        return (
            expected,
            torch.from_numpy(table),
            json.loads(metadata["signature"]),
            is_restored,
        )

    expected, found, signature, is_restored = on_ranks(1, run)[0]
    assert is_restored
    assert len(expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    image, _ = Shapes("val", 5, 64, "boxes", 0.25)[0]
    assert signature["answer"] == "boxes"
    assert signature["inputs"] == {
        "image": {"shape": list(image.shape), "dtype": "uint8"}
    }
    assert signature["output"]["shape"] == ["boxes", 6]


# ---------------------------------------------------------------- several inputs


def test_several_inputs_by_name_in_python_and_as_a_program(tmp_path: Path) -> None:
    data = rows("image", "age")
    inputs = {
        "image": torch.stack([row["image"] for row, _ in data]),
        "age": torch.tensor([row["age"] for row, _ in data]),
    }
    write_png(torch.zeros(1, 2, 2, dtype=torch.uint8), str(tmp_path / "a.png"))

    def run() -> Any:
        trained(tmp_path, TwoInputs(), [({**row}, target) for row, target in data])
        predictor = Predictor(tmp_path / "run", model=TwoInputs())
        answers = torch.stack([a.values for a in predictor.answer(inputs)])
        path = export(predictor, "torch", tmp_path / "best.pt2")
        program, signature = program_of(path)
        return answers, program(inputs), signature, predictor.module.state_dict()

    answers, found, signature, weights = on_ranks(1, run)[0]
    model = TwoInputs()
    model.load_state_dict(weights)
    expected = model(inputs["image"], inputs["age"]).softmax(1)
    torch.testing.assert_close(answers, expected)
    torch.testing.assert_close(found, expected)
    assert signature["inputs"] == {
        "image": {"shape": ["batch", 1, 2, 2], "dtype": "float32"},
        "age": {"shape": ["batch"], "dtype": "float32"},
    }


def test_a_file_is_one_of_several_inputs_or_the_only_one(tmp_path: Path) -> None:
    write_png(torch.full((1, 2, 2), 51, dtype=torch.uint8), str(tmp_path / "a.png"))
    transforms = [{"name": "ToDtype", "dtype": "float32", "scale": True}]

    def run() -> Any:
        answers = []
        for name, model, data in (
            ("one", OneInput, rows("pixel_values")),
            ("two", TwoInputs, rows("image", "age")),
        ):
            own = [(row, target) for row, target in data]
            trained(tmp_path, model(), own, run__name=name)
            predictor = Predictor(
                tmp_path / name, [f"data.val_transforms={transforms}"], model=model()
            )
            try:
                [(_, answer)] = predictor.predict([tmp_path / "a.png"])
                answers.append(answer.values)  # type: ignore[union-attr]
            except ConfigError as error:
                answers.append(str(error))
            answers.append(predictor.module.state_dict())
        return answers

    answer, weights, message, _ = on_ranks(1, run)[0]
    model = OneInput()
    model.load_state_dict(weights)
    expected = model(torch.full((1, 1, 2, 2), 51 / 255)).softmax(1)[0]
    torch.testing.assert_close(answer, expected)
    assert "takes image, age, and a file is one of them" in message


def test_a_program_of_padded_sequences_takes_any_length(tmp_path: Path) -> None:
    def run() -> Any:
        torch.manual_seed(0)
        trained(
            tmp_path,
            Pooled(),
            Waves(True, samples=8),
            data__collate="examples.sequences.data.pad",
        )
        predictor = Predictor(tmp_path / "run", model=Pooled())
        path = export(predictor, "torch", tmp_path / "best.pt2")
        program, _ = program_of(path)
        results = []
        for steps in (17, 33):
            draw = torch.Generator().manual_seed(steps)
            values = torch.rand(3, steps, 1, generator=draw)
            inputs = {"values": values, "lengths": torch.tensor([5, steps, 9])}
            answers = torch.stack([a.values for a in predictor.answer(inputs)])
            results.append((program(inputs), answers))
        return results

    for found, expected in on_ranks(1, run)[0]:
        torch.testing.assert_close(found, expected)


def test_a_detector_needs_no_data_to_be_built_again(detector: Path) -> None:
    predictor = Predictor(detector / "detection")
    kind = type(small_detector(4, width=4))
    assert isinstance(predictor.module, kind)
    figures = {p.name for p in (detector / "detection" / "figures").iterdir()}
    assert "predictions.png" in figures
