"""`python -m trainer predict`: the run's own answers, from the run directory alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.io import read_image, write_jpeg, write_png

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net
from tests.image_damage import png
from tests.programs import run_program
from trainer import Trainer
from trainer.commands.predict_output import print_predictions
from trainer.components.answers import Answer
from trainer.config.load import load
from trainer.core.evaluation import Decision
from trainer.data.datasets import digits
from trainer.data.decoding import decode
from trainer.errors import ConfigError, LockstepError
from trainer.inspection.export import AnsweringModel, export
from trainer.inspection.predictor import Predictor
from trainer.storage.signature import Signature

ROOT = Path(__file__).parents[1]
RESIZE = "data.val_transforms=[{name: Resize, size: [8, 8], interpolation: nearest}]"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Decision]]:
    """A short run on digits, its validation images as files, and what its best model decided on them."""
    root = tmp_path_factory.mktemp("digits")

    def run() -> list[Decision]:
        settings = load(
            ROOT / "configs/digits.yaml",
            [
                f"run.dir={root}",
                "train.epochs=1",
                "train.max_steps=9",
                "run.figures=false",
                "wandb.mode=disabled",
            ],
        )
        trainer = Trainer(settings)
        trainer.fit()
        trainer.load_best()
        assert trainer.run.evaluator is not None
        return trainer.run.evaluator.decisions()

    decisions: list[Decision] = on_ranks(1, run)[0]
    (root / "images" / "sub").mkdir(parents=True)
    val: Any = digits().val
    for i in range(12):
        write_png(
            val.images[i],
            str(root / "images" / ("sub" if i % 2 else "") / f"{i:02}.png"),
        )
    return root, decisions


def predict(
    *arguments: object, status: int = 0, **environment: str
) -> CompletedProcess[str]:
    done = run_program(
        ["-m", "trainer", "predict", *arguments], env={**os.environ, **environment}
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_files_get_the_decisions_of_the_evaluation(
    held: tuple[Path, list[Decision]], tmp_path: Path
) -> None:
    root, decisions = held
    pattern, single = f"{root}/images/*.png", root / "images" / "sub" / "01.png"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    write_png(torch.zeros(1, 9, 8, dtype=torch.uint8), str(tmp_path / "large.png"))
    odd = shutil.copytree(root / "digits", tmp_path / "lr=0.1")
    done = predict(
        "--top=2",
        "--export",
        "torch",
        odd,
        single,
        tmp_path,
        pattern,
        root / "images",
        "batch.eval_size=5",
        status=2,
    )
    answers = {
        Path(answer["file"]).stem: answer
        for answer in map(json.loads, done.stdout.splitlines())
    }
    assert list(answers) == [
        "01",
        *(f"{i:02}" for i in range(0, 12, 2)),
        *(f"{i:02}" for i in range(3, 12, 2)),
    ]
    for i, decision in enumerate(decisions[:12]):
        answer = answers[f"{i:02}"]
        assert (answer["class"], answer["class_id"]) == (
            str(decision.predicted),
            decision.predicted,
        )
        assert answer["probability"] == pytest.approx(decision.confidence, rel=1e-5)
        assert [list(other) for other in answer["top"]] == [
            ["class", "class_id", "probability"]
        ] * 2
        assert answer["top"][0]["probability"] >= answer["top"][1]["probability"]
    written, *errors = done.stderr.splitlines()
    assert Path(written) == odd / "best.pt2" and (odd / "best.pt2").is_file()
    assert len(errors) == 3
    assert f"{broken} cannot be decoded" in errors[0]
    assert (
        "large.png is 1 × 9 × 8" in errors[1]
        and "1 × 8 × 8" in errors[1]
        and "{name: Resize" in errors[1]
    )
    assert errors[2] == "error: 2 of 14 files have no answer"


def test_colour_files_become_grey_and_overridden_transforms_hold(
    held: tuple[Path, list[Decision]], tmp_path: Path
) -> None:
    root, decisions = held
    val: Any = digits().val
    for i in range(3):
        large = (
            val.images[i]
            .repeat_interleave(16, 1)
            .repeat_interleave(16, 2)
            .expand(3, -1, -1)
        )
        write_jpeg(large.contiguous(), str(tmp_path / f"{i}.jpg"), quality=100)
    predictor = on_ranks(
        1,
        lambda: list(
            Predictor(root / "digits", [RESIZE]).classify(sorted(tmp_path.iterdir()))
        ),
    )[0]
    for (_, shares), decision in zip(predictor, decisions, strict=False):
        assert isinstance(shares, torch.Tensor)
        assert int(shares.argmax()) == decision.predicted
        assert float(shares.sum()) == pytest.approx(1)
        assert float(shares.max()) == pytest.approx(decision.confidence, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: RUN"),
        (["{run}"], "PATH: is missing"),
        (["{run}", "nowhere/*.png"], "nowhere/*.png does not exist"),
        (["{run}", "{root}/empty"], "empty holds no image files"),
        (["{root}/images", "{root}/images"], "images: is not a run directory"),
        (["{run}", "{root}/images", "--top", "0"], "--top: needs a whole number, 1 or more"),
        (["{run}", "{root}/images", "--export", "onx"], '"onx" is not one of torch, onnx; did you mean'),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    held: tuple[Path, list[Decision]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    from trainer.commands.predict import main

    (held[0] / "empty").mkdir(exist_ok=True)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # of this process
    with pytest.raises(LockstepError) as raised:
        main(
            [
                argument.format(run=held[0] / "digits", root=held[0])
                for argument in arguments
            ]
        )
    assert message in str(raised.value) and raised.value.exit_status == 2


def test_one_process_predicts(held: tuple[Path, list[Decision]]) -> None:
    """Refused before the processes join: none waits for another."""
    run = predict(held[0] / "digits", held[0] / "images", status=2, WORLD_SIZE="2")
    assert run.stderr.startswith(
        "error: WORLD_SIZE: 2 processes were started, and one predicts"
    )


def test_a_model_that_was_given_is_asked_for_again(tmp_path: Path) -> None:
    def run() -> tuple[Signature, list[float], list[float]]:
        trainer = Trainer(
            config(tmp_path),
            model=conv_net(),
            train_data=Images(56),
            val_data=Images(5),
        )
        trainer.fit()
        trainer.load_best()
        with pytest.raises(LockstepError, match="does not fit the weights"):
            Predictor(tmp_path / "run")
        predictor = Predictor(tmp_path / "run", model=conv_net())
        images = Images(5).points
        shares = trainer.module.eval()(images).softmax(1)
        return (
            predictor.signature,
            shares.tolist(),
            AnsweringModel(predictor)(images).tolist(),
        )

    signature, expected, found = on_ranks(1, run)[0]
    assert signature == Signature(2, [2, 5, 5], "float64", 4, list("abcd"))
    assert found == expected


def exported_torch(run: Path, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    files = {"classes.json": ""}
    program = torch.export.load(
        export(Predictor(run), "torch", path), extra_files=files
    ).module()
    assert json.loads(files["classes.json"]) == [str(i) for i in range(10)]
    return program


def exported_onnx(run: Path, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime as runtime

    session = runtime.InferenceSession(export(Predictor(run), "onnx", path))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == [
        str(i) for i in range(10)
    ]
    return lambda images: torch.from_numpy(
        session.run(None, {"images": images.numpy()})[0]
    )


@pytest.mark.parametrize(
    ("write", "name"), [(exported_torch, "m.pt2"), (exported_onnx, "m.onnx")]
)
def test_exported_programs_give_the_same_numbers(
    held: tuple[Path, list[Decision]], tmp_path: Path, write: Any, name: str
) -> None:
    root, decisions = held
    val: Any = digits().val

    def exported() -> list[tuple[list[int], list[float]]]:
        program = write(root / "digits", tmp_path / name)
        largest = [program(val.images[:count]).max(1) for count in (1, 7)]
        return [
            (predicted.tolist(), confidence.tolist())
            for confidence, predicted in largest
        ]

    if write is exported_onnx:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    # In a process of its own: after torch.export, no fork of a process that has run a backward can run one.
    for count, (predicted, confidence) in zip(
        (1, 7), on_ranks(1, exported)[0], strict=True
    ):
        assert predicted == [decision.predicted for decision in decisions[:count]]
        assert confidence == pytest.approx(
            [d.confidence for d in decisions[:count]], rel=1e-5
        )
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_onnx_names_what_is_missing(
    held: tuple[Path, list[Decision]], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(held[0] / "digits")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnx" else object()
    )
    with pytest.raises(
        ConfigError, match="--export: onnx needs onnx: pip install onnx onnxscript"
    ):
        export(predictor, "onnx", held[0] / "m.onnx")


def test_the_folder_may_be_gone_and_colour_stays_colour(tmp_path: Path) -> None:
    """A run on colour files that its transforms turn grey, predicted after its data are gone."""
    draw = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for label in ("ants", "bees"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for i in range(4):
                image = torch.randint(256, (3, 12, 10), generator=draw).to(torch.uint8)
                write_png(image, str(tmp_path / "data" / part / label / f"{i}.png"))

    def run() -> list[Decision]:
        transforms = "transforms=[{name: Grayscale}, {name: Resize, size: [8, 8]}]"
        overrides = [
            f"data.root={tmp_path / 'data'}",
            f"data.train_{transforms}",
            f"data.val_{transforms}",
        ]
        overrides += [
            "data.name=folder",
            "batch.size=4",
            "wandb.mode=disabled",
            f"run.dir={tmp_path}",
            "run.name=r",
        ]
        trainer = Trainer(
            load(None, [*overrides, "train.epochs=1", "run.figures=false"])
        )
        trainer.fit()
        trainer.load_best()
        assert trainer.run.evaluator is not None
        return trainer.run.evaluator.decisions()

    decisions = on_ranks(1, run)[0]
    (tmp_path / "data" / "val").rename(tmp_path / "asked")
    shutil.rmtree(tmp_path / "data")
    done = predict(tmp_path / "r", tmp_path / "asked", "--json", "data.workers=1")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 8 and decode(
        tmp_path / "asked" / "ants" / "0.png"
    ).shape == (3, 12, 10)
    for answer, decision in zip(answers, decisions, strict=True):
        assert answer["class"] == ["ants", "bees"][decision.predicted]
        assert answer["probability"] == pytest.approx(decision.confidence, rel=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_no_decoder_survives_cost_no_other_its_answer(
    held: tuple[Path, list[Decision]], tmp_path: Path, workers: int
) -> None:
    root, _ = held
    right = (root / "images" / "00.png").read_bytes()
    flipped = bytearray(right)
    flipped[-30] ^= 1
    broken = {
        "flipped": bytes(flipped),
        "cut": right[:-20],
        "written_wrongly": png((8, 8, 8, 0, 0), b"too few"),
        "vast": png((30_000, 30_000, 8, 2, 0), b""),
    }
    for name, content in broken.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    done = predict(
        root / "digits", root / "images", tmp_path, f"data.workers={workers}", status=2
    )
    answers = [json.loads(line)["file"] for line in done.stdout.splitlines()]
    assert len(answers) == 12 and all("images" in file for file in answers)
    *errors, last = done.stderr.splitlines()
    assert last == "error: 4 of 16 files have no answer"
    for name in broken:
        assert sum(str(tmp_path / f"{name}.png") in line for line in errors) == 1


@pytest.mark.parametrize(
    "state",
    [torch.device("meta"), torch.autocast("cpu", torch.bfloat16)],
    ids=["device", "autocast"],
)
def test_the_program_of_a_predictor_has_no_say(
    held: tuple[Path, list[Decision]], state: Any
) -> None:
    """Nor do the paths' types."""
    root, _ = held
    run, file = root / "digits", root / "images" / "00.png"
    ((_, expected),) = Predictor(run).classify([file])
    with state:
        ((path, answer),) = Predictor(str(run)).classify([str(file)])
    assert path == file
    assert torch.equal(answer, expected)


class Drawings:
    """Colour images, `(3, 6, 6)` uint8, whose targets are what `make_target` reads off them."""

    classes = ("dark", "light", "red")

    def __init__(self, make_target: Callable[[torch.Tensor], Any]) -> None:
        draw = torch.Generator().manual_seed(4)
        shape = (40, 3, 6, 6)
        self.images = torch.randint(256, shape, generator=draw).to(torch.uint8)
        self.make_target = make_target

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Any]:
        return self.images[i], self.make_target(self.images[i])


def flat(outputs: int) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, outputs))


@pytest.mark.parametrize(
    ("kind", "loss", "model", "make_target", "values_of"),
    [
        (
            "values",
            "mse",
            flat(2),
            lambda image: image.float().mean((1, 2))[:2] / 255,
            lambda output: output,
        ),
        (
            "labels",
            "bce_with_logits",
            flat(3),
            lambda image: (image.float().mean((1, 2)) > 127).float(),
            torch.sigmoid,
        ),
        (
            "class_map",
            "cross_entropy",
            nn.Conv2d(3, 3, 1),
            lambda image: (image[0] > 127).long(),
            lambda output: output.softmax(1),
        ),
    ],
)
def test_every_task_has_an_answer(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    kind: str,
    loss: str,
    model: nn.Module,
    make_target: Any,
    values_of: Any,
) -> None:
    """Files are answered as the trained model answers tensors: in Python, as JSON, as a table, and as a program."""
    data = Drawings(make_target)
    settings = config(
        tmp_path / "runs",
        loss__name=loss,
        train__precision="fp32",
        train__max_steps=2,
        batch__size=20,
    )
    trainer = Trainer(settings, model=model, train_data=data, val_data=data)
    trainer.fit()
    trainer.load_best()
    images = data.images[:5]
    expected = values_of(trainer.module.eval()(images / 255)).detach()

    files = [tmp_path / f"{i}.png" for i in range(5)]
    for image, file in zip(images, files, strict=True):
        write_png(image, str(file))
    predictor = Predictor(tmp_path / "runs/run", model=model)
    answers = [answer for _, answer in predictor.predict(files)]
    for answer, value in zip(answers, expected, strict=True):
        assert isinstance(answer, Answer) and answer.kind == kind
        torch.testing.assert_close(answer.values, value)
    torch.testing.assert_close(AnsweringModel(predictor)(images), expected)

    masks = tmp_path / "masks" if kind == "class_map" else None
    capsys.readouterr()
    print_predictions(predictor, files, top=2, as_json=True, masks=masks)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    print_predictions(predictor, files, top=2, as_json=False, masks=None)
    assert "0.png" in capsys.readouterr().out
    for i, (line, value) in enumerate(zip(lines, expected, strict=True)):
        names = data.classes
        if kind == "values":
            assert line["values"] == pytest.approx(value.tolist(), rel=1e-5, abs=1e-6)
        elif kind == "labels":
            chosen = [n for n, v in zip(names, value.tolist(), strict=True) if v >= 0.5]
            assert line["labels"] == chosen
            assert line["top"][0]["probability"] == pytest.approx(float(value.max()))
        else:
            classes = value.argmax(0)
            shares = {entry["class"]: entry["share"] for entry in line["classes"]}
            for class_id, name in enumerate(names):
                share = (classes == class_id).double().mean().item()
                assert shares.get(name, 0.0) == pytest.approx(share)
            mask = read_image(str(tmp_path / f"masks/{i}.png"))
            assert torch.equal(mask[0].long(), classes)


def test_a_classifier_has_no_masks(
    held: tuple[Path, list[Decision]], tmp_path: Path
) -> None:
    root, _ = held
    image = root / "images" / "00.png"
    done = predict(root / "digits", image, "--masks", tmp_path / "masks", status=2)
    message = "error: --masks: the run's model gives no class for each pixel"
    assert done.stderr.splitlines()[-1] == message
    assert not (tmp_path / "masks").exists()
