"""`--help optimizer.adamw` and its like: what a section, a key or a component takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import pytest
import torch

import trainer.__main__ as program
from trainer.commands.component_help import topic_help
from trainer.commands.component_places import PLACES
from trainer.commands.docstrings import argument_notes
from trainer.config.component_lists import LISTS
from trainer.config.fields import declared_keys
from trainer.config.schema import SECTIONS
from trainer.errors import ConfigError


def factory(size: int, *, names: Sequence[str] = ("a",), **kwargs: object) -> None:
    """Make something.

    Args:
        size (int): how *large*:
            over two lines
        names (list of ``str``, optional): which (default: ("a",))

    Returns:
        size: not an argument
    """


@pytest.mark.parametrize(
    ("topic", "parts", "absent"),
    [
        (
            "optimizer.adamw",
            [
                "optimizer.adamw  (torch.optim.adamw.AdamW)\n  Implements AdamW",
                "  optimizer.betas=[0.9, 0.999]  (tuple[float | Tensor, float | Tensor])\n      coefficients used",
                "  optimizer.weight_decay=0.01  (float)\n      weight decay coefficient\n",
                "(--help optimizer)\n  name, lr, ",
            ],
            ["optimizer.params", "optimizer.lr=", "(default:", "math"],
        ),
        (
            "optimizer.torch.optim.RMSprop",
            ["  optimizer.alpha=0.99  (float)\n      smoothing constant\n"],
            ["(torch.optim.RMSprop)"],
        ),
        (
            "loss.cross_entropy",
            ["  loss.label_smoothing=0.0  (float)\n      share of the target spread"],
            ["loss.num_classes"],
        ),
        ("loss.torch.nn.HuberLoss", ["  loss.delta=1.0  (float)\n"], []),
        # What the function passes on, without what it gives itself.
        (
            "model.resnet18",
            ["  model.zero_init_residual=false  (bool)", "  model.width_per_group=64"],
            ["model.block", "model.num_classes=", "kwargs"],
        ),
        (
            "model",
            ["\nnames\n  small_cnn, resnet9, small_segmenter, small_detector, alexnet"],
            [],
        ),
        ("model.small_segmenter", ["  model.width=16  (int)"], []),
        ("schedule.step", ["  schedule.gamma=0.1  (float)"], ["clock"]),
        ("data.fake", ["  data.val_size=200  (int)"], []),
        (
            "data.train_transforms.RandomCrop",
            [
                "\n  size is needed  (Union[int, Sequence[int]])\n      Desired output size",
                "\n  padding_mode=constant",
            ],
            ["keys of the section"],
        ),
        (
            "optimizer",
            ["  optimizer.lr=0.1  (number)", "\nnames\n  sgd, adam, adamw\n"],
            [],
        ),
        (
            "optimizer.lr",
            ["  optimizer.lr=0.1  (number)\n      learning rate"],
            ["betas"],
        ),
        ("data.val_transforms", ["list of mappings", "RandomCrop, "], []),
        ("train", ["  train.epochs=10  (integer)"], ["\nnames\n"]),
        (
            "train.mix",
            ["\nits keys\n  train.mix.mixup=0.0  (number)\n      Beta's parameter"],
            [],
        ),
        ("train.mix.off_after", ["  train.mix.off_after=1.0  (number)"], ["cutmix"]),
        ("early_stop", ["  early_stop.patience=null  (integer|null)"], []),
        ("ema", ["  ema.decay=null  (number|null)\n      keep an exponential"], []),
        (
            "observers.save_predictions",
            ["  every=1  (int)\n", "  format=csv  (str)\n", "keys of each item"],
            ["observers.every"],
        ),
        (
            "trackers.mlflow",
            [
                "  experiment=lockstep  (str)",
                "--help trackers)\n  name, strict, timeout",
            ],
            [],
        ),
        ("observers", ["\nnames\n  save_predictions\n"], []),
        (
            "metrics.torchmetrics.classification.MulticlassF1Score",
            [
                "  num_classes from the run, unless given  (int)\n      Integer",
                "  average=macro  (",
                "(--help metrics)\n  name, log_as",
            ],
            ["is needed"],
        ),
        ("metrics", ["  metrics.log_as=null  (text|null)", "torchmetrics.AUROC,"], []),
        (
            f"model.{__name__}.factory",
            [
                "model.size is needed  (int)\n      how *large*: over two lines\n",
                "model.names=[a]  (Sequence[str])\n      which\n",
                "…  any further key is passed on",
            ],
            ["not an argument"],
        ),
    ],
)
def test_what_a_topic_shows(topic: str, parts: list[str], absent: list[str]) -> None:
    text = topic_help(topic)
    for part in parts:
        assert part in text
    for part in absent:
        assert part not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("topic", "message"),
    [
        ("optimzer", 'optimzer: no such section; --help lists them; did you mean "opt'),
        ("optimizer.adamx", 'lists nor an import path; did you mean "adam"?'),
        ("model.resnet11", 'did you mean "resnet1'),
        ("data.train_transforms.RandomCorp", 'did you mean "RandomCrop"?'),
        ("optimizer.torch.optim.Adamm", '"torch.optim" has no "Adamm"; did you mean'),
        ("train.epoch", 'train.epoch: no such key; did you mean "epochs"?'),
        ("train.mix.mixupp", 'no such key; did you mean "mixup"?'),
        ("data.collate.lists", "no such topic; --help data.collate says what"),
        ("metrics.MulticlassF1", 'did you mean "MulticlassF1Score"?'),
        ("observers.save_prediction", 'did you mean "save_predictions"?'),
    ],
)
def test_a_wrong_topic_is_one_line(
    topic: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert program.main(["train", "--help", topic]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1


def test_every_section_and_named_component_has_help(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    topics = [*SECTIONS, *LISTS]
    for place in PLACES:
        topics += [f"{place}.{name}" for name in PLACES[place].names()]
    assert len(topics) > 200
    for topic in topics:
        assert topic_help(topic).startswith(topic)
    for topic in ("data", "model"):
        for name in declared_keys(SECTIONS[topic]):
            assert f"  {topic}.{name}=" in topic_help(topic)
    assert program.main(["--help", "optimizer", "loss"]) == 0
    output = capfd.readouterr().out
    assert "\nnames\n  sgd, adam, adamw\n" in output and "\n\nloss\n" in output


def test_a_metric_is_found_by_its_class_alone() -> None:
    assert topic_help("metrics.F1Score") == topic_help("metrics.torchmetrics.F1Score")
    text = topic_help("metrics.MulticlassAUROC")
    assert text.startswith("metrics.torchmetrics.classification.MulticlassAUROC ")


def test_every_argument_of_torchs_optimizers_is_described() -> None:
    for cls in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad):
        described = argument_notes(cls)
        assert set(inspect.signature(cls).parameters) <= set(described)
    with pytest.raises(ConfigError, match="cannot import"):
        topic_help("optimizer.no_such_package.Optimizer")
