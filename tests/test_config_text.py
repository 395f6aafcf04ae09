"""Text as it was typed, numbers that are what they look like, and components that an override switches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config.fields import show
from trainer.config.load import load
from trainer.config.registry import build
from trainer.config.schema import Config
from trainer.errors import ConfigError
from trainer.storage.run_directory import config_yaml
from trainer.sweep.check import check
from trainer.sweep.description import format_overrides, read_sweep

ROOT = Path(__file__).parents[1]
# Each is something else to YAML 1.1 or to OmegaConf.
TEXTS = [
    *("12e4567", "0777", "1e5", "1_000", "1:30", "0x1f", ".5", "007", "10"),
    *("yes", "off", "No", "true", "nan", "inf", "2024-01-01", "1.10", "+1"),
]
# What YAML would cut, refuse or nest, typed on a command line.
TYPED = [
    *TEXTS,
    *("/data/set #2", "a: b", "[draft] one", "{x}", "* new", "- a", "!x", "%d", "@x"),
    *("it's", '5" disc', "a=b", "Null", " padded ", "{", "'a' and 'b'"),
]


def value_of(config: Config, name: str) -> Any:
    section, _, key = name.partition(".")
    return config.to_dict()[section][key]


@pytest.mark.parametrize("text", TYPED)
def test_text_is_what_was_typed(text: str) -> None:
    overrides = [f"run.name={text}", f"data.root={text}", f"wandb.notes={text}"]
    config = load(None, overrides)
    assert (config.run.name, config.data.root, config.wandb.notes) == (text,) * 3
    # As our own sweeps write it.
    assert load(None, format_overrides({"run.name": text})).run.name == text


@pytest.mark.parametrize("text", TEXTS)
def test_text_in_a_file_is_what_was_written(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        f"run: {{name: {text}}}  # a comment\n"
        f"data:\n  root: {text}\n  train_transforms: [{{name: {text}}}]\n"
        f"wandb: {{tags: [{text}, b], name: '${{run.name}}', notes: null}}\n"
        f"model: {{freeze: {text}, name: {text}}}\n"
        f"observers: [{{name: a.{text}}}]\n"
    )
    config = load(file)
    assert (config.run.name, config.data.root, config.wandb.name) == (text,) * 3
    assert config.data.train_transforms == [{"name": text}]
    assert config.wandb.tags == [text, "b"]
    assert config.model.freeze == config.model.name == text
    assert config.wandb.notes is None
    # Written and read again, also as an argument, whose type only its component knows.
    again = load(file, [f"data.split={show(text)}"])
    file.write_text(config_yaml(again))
    assert load(file) == again
    assert again.data.args == {"split": text}


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("wandb.tags=[007, 1e5, 'a b']", "wandb.tags", ["007", "1e5", "a b"]),
        ("wandb={tags: [1e5], notes: 0777}", "wandb.notes", "0777"),
        ("model.freeze=[conv1, 0777]", "model.freeze", ["conv1", "0777"]),
        ("data.root=null", "data.root", None),
        ("data.root=", "data.root", None),
        ("data.root=None", "data.root", None),
        ("data.root='null'", "data.root", "null"),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.lr=.5", "optimizer.lr", 0.5),
        ("batch.size=1_000", "batch.size", 1000),
        ("batch.size=0x10", "batch.size", 16),
        ("batch.fuse=auto", "batch.fuse", "auto"),
        ("train.compile=on", "train.compile", True),
        ("data.split=/data/set #2", "data.split", "/data/set #2"),
    ],
)
def test_values_on_the_command_line(override: str, name: str, value: Any) -> None:
    assert value_of(load(None, [override]), name) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.size=010", "batch.size: 010 begins with 0, and YAML reads it as 8"),
        ("batch.size=1:30", "batch.size: 1:30 is a number to the base of 60"),
        ("optimizer.lr=1e999", "optimizer.lr: 1e999 is too large or too small"),
        ("optimizer.weight_decay=1e-999", "optimizer.weight_decay: 1e-999 is too "),
        ("data.split=0777", "data.split: 0777 begins with 0"),
        ("data.sizes=[1, 0777]", r"data.sizes\[1\]: 0777 begins with 0"),
        ("optimizer.lr=0.1 # high", "optimizer.lr: '0.1 # high' is not a number"),
        ("optimizer.lr=nan", "optimizer.lr: .nan. is not a number"),
        ("batch.size=yes", "batch.size: true is not an integer"),
        ("run.name=null", "run.name: null is not text"),
        ("train.precision=16", "train.precision: '16' is not one of"),
    ],
)
def test_what_is_not_what_it_looks_like_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


def test_a_misread_number_in_a_file_is_found_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("batch:\n  # 10\n  size: 010\n")
    with pytest.raises(ConfigError, match=r"batch.size: 010 .* line 3\)"):
        load(file)


def test_text_of_the_environment_stays_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOT", "0777")
    config = load(None, ["data.root=${oc.env:ROOT}", "run.name=a-${data.root}"])
    assert (config.data.root, config.run.name) == ("0777", "a-0777")


class Split:
    """A component with arguments that are text."""

    def __init__(
        self,
        split: str | None = None,
        classes: Sequence[str] = (),
        size: int | str = 0,
        rate: float = 0.0,
    ) -> None:
        self.arguments = (split, list(classes), size, rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": 511}, "data.split: 511 is not text"),
        ({"split": False}, "data.split: false is not text"),
        ({"classes": ["cat", 7]}, "data.classes: 7 is not text"),
        ({"split": "0777", "classes": ["7"], "size": 7, "rate": 1}, ""),
    ],
)
def test_a_number_where_a_component_takes_text(
    arguments: dict[str, Any], message: str
) -> None:
    if message:
        with pytest.raises(ConfigError, match=message):
            build("data", Split, arguments)
    else:
        assert build("data", Split, arguments).arguments == ("0777", ["7"], 7, 1)


# ---------------------------------------------------------------- switching


FILE = """
optimizer: {name: sgd, lr: 0.5, momentum: 0.9, weight_decay: 5.0e-4}
schedule: {name: step, per: epoch, step_size: 3, gamma: 0.5, warmup: 1}
model: {name: small_cnn, width: 8}
loss: {name: cross_entropy, label_smoothing: 0.1}
data: {name: fake, samples: 100, workers: 1}
best: {metric: val/accuracy, mode: max}
"""


@pytest.mark.parametrize(
    ("overrides", "name", "section", "left_out"),
    [
        (["optimizer.name=adamw"], "optimizer", {"lr": 0.5}, "momentum, weight_decay"),
        (
            ["optimizer.name=adamw", "optimizer.weight_decay=0.1"],
            "optimizer",
            {"lr": 0.5, "weight_decay": 0.1},
            "momentum",
        ),
        (
            ["optimizer={name: adamw, betas: [0.5, 0.9]}"],
            "optimizer",
            {"lr": 0.5, "betas": [0.5, 0.9]},
            "momentum, weight_decay",
        ),
        (["schedule.name=cosine"], "schedule", {"warmup": 1.0}, "step_size, gamma"),
        (["model.name=resnet18"], "model", {"weights": None}, "width"),
        (["loss.name=mse"], "loss", {}, "label_smoothing"),
        (["data.name=digits"], "data", {"workers": 1}, "samples"),
        # The same component, by its name or its import path, keeps what it has.
        (["optimizer.name=sgd"], "optimizer", {"momentum": 0.9}, ""),
        (["optimizer.name=torch.optim.SGD"], "optimizer", {"momentum": 0.9}, ""),
        (["optimizer.lr=0.1"], "optimizer", {"momentum": 0.9, "lr": 0.1}, ""),
    ],
)
def test_a_switched_component_leaves_its_files_arguments(
    overrides: list[str],
    name: str,
    section: dict[str, Any],
    left_out: str,
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(FILE)
    config = load(file, overrides)
    values = config.to_dict()[name]
    assert {key: values.get(key) for key in section} == section
    for key in left_out.split(", ") if left_out else ():
        assert key not in values
    if left_out:
        (note,) = config.notes
        assert note.endswith(f"whose arguments in the file are left out: {left_out}")
    else:
        assert config.notes == ()


def test_arguments_beside_the_new_name_are_checked(tmp_path: Path) -> None:
    from torch import nn

    from trainer.components.optimizer import build_optimizer

    file = tmp_path / "a.yaml"
    file.write_text(FILE)
    model = nn.Linear(2, 2)
    switched = load(file, ["optimizer.name=adamw"])
    assert build_optimizer(switched.optimizer, model).defaults["weight_decay"] == 0.01
    beside = load(file, ["optimizer.name=adamw", "optimizer.momentum=0.9"])
    assert beside.notes[0].endswith(": weight_decay")
    file.write_text(FILE.replace("name: sgd", "name: adamw"))
    for config in (beside, load(file)):
        with pytest.raises(ConfigError, match=r"optimizer.momentum: AdamW has no such"):
            build_optimizer(config.optimizer, model)


def test_another_best_metric_leaves_the_files_mode(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(FILE)
    config = load(file, ["best.metric=val/loss"])
    assert config.best.mode is None
    assert "best.mode=max in the file is left out" in config.notes[0]
    assert load(file, ["best.metric=val/loss", "best.mode=max"]).best.mode == "max"


# ---------------------------------------------------------------- sweeps


def write_sweep(directory: Path, parameters: str) -> Path:
    tree = {
        "program": "train.py",
        "method": "grid",
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "command": ["${program}", "configs/digits.yaml", "${args_no_hyphens}"],
    }
    file = directory / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree) + f"parameters:\n{parameters}")
    return file


def test_components_can_be_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    names = (
        "  optimizer.name: {values: [sgd, adamw, torch.optim.RMSprop]}\n"
        "  schedule.name: {values: [step, cosine]}\n"
    )
    check(read_sweep(write_sweep(tmp_path, names)), [])
    beside = names + "  optimizer.momentum: {values: [0.9]}\n"
    with pytest.raises(ConfigError, match=r"optimizer.momentum: AdamW has no such"):
        check(read_sweep(write_sweep(tmp_path, beside)), [])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("data.root: {values: [0777, b]}", "data.root: 0777 is 511 to YAML"),
        ("wandb.notes: {value: yes}", "wandb.notes: yes is True to YAML"),
        (
            "optimizer: {parameters: {x: {value: 1:30}}}",
            "optimizer.x: 1:30 is a number",
        ),
        ("data.day: {value: 2024-01-01}", "data.day: 2024-01-01 is a date"),
        ("data.root: {values: ['0777', 1e5, 12, null]}", ""),
    ],
)
def test_text_of_a_sweep_that_yaml_would_misread(
    parameters: str, message: str, tmp_path: Path
) -> None:
    file = write_sweep(tmp_path, f"  {parameters}\n")
    if message:
        with pytest.raises(ConfigError, match=f"parameters.{message}"):
            read_sweep(file)
        return
    (parameter,) = read_sweep(file).parameters
    roots = [
        load(None, format_overrides({"data.root": value})).data.root
        for value in parameter.choices
    ]
    assert roots == ["0777", "1e5", "12", None]
