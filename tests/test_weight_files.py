"""Files of weights as people have them: wrapped, prefixed, averaged, sharded, of another model."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from trainer.components.weights import load_weights, start_from_weights
from trainer.config.model_sections import ModelConfig
from trainer.errors import ConfigError


def net(classes: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = net()


def source(seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        name: torch.randn(v.shape).to(v.dtype) for name, v in net().state_dict().items()
    }


def prefixed(prefix: str, seed: int = 1) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in source(seed).items()}


def assert_loaded(model: nn.Module, seed: int = 1) -> None:
    for name, tensor in source(seed).items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (source(), ""),
        (prefixed("module."), 'names without "module."'),
        (prefixed("_orig_mod."), 'names without "_orig_mod."'),
        (prefixed("module.module."), 'names without "module.module."'),
        (prefixed("_orig_mod.module."), 'names without "module."'),
        ({"state_dict": prefixed("model."), "epoch": 3}, 'names without "model."'),
        (
            {"state_dict": prefixed("net.") | {"loss.weight": torch.ones(2)}},
            "1 not used: loss.weight",
        ),
        ({"model_state_dict": source(), "loss": torch.ones(())}, "model_state_dict of"),
        ({"model": source(), "args": argparse.Namespace(lr=0.1)}, "model of the file"),
        ({"model": {"state_dict": source()}}, "model.state_dict of the file"),
        ({"model_ema": source()}, "model_ema of the file"),
        (
            {"model": source(), "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
            "model of the file",
        ),
        (
            AveragedModel(net()).state_dict() | prefixed("module."),
            "1 not used: n_averaged",
        ),
    ],
)
def test_weights_are_found_whatever_wraps_them(
    content: Any, note: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path)
    model = net()
    said = load_weights(model, path, "2")
    assert_loaded(model)
    assert note in said
    assert said.startswith("9 of 9 tensors of a.pt")


def test_a_model_that_wraps_what_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(source(), path)
    model = Wrapped()
    assert 'names with "backbone." before them' in load_weights(
        model, path, "backbone.2"
    )
    assert_loaded(model.backbone)


def test_an_average_is_asked_for_and_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": prefixed("module."), "state_dict_ema": source(2)}, path)
    with pytest.raises(
        ConfigError, match=r"several sets .*: state_dict.module, state_dict_ema; set"
    ):
        load_weights(net(), path, "2")
    for key, seed in (("state_dict", 1), ("state_dict_ema", 2)):
        model = net()
        load_weights(model, path, "2", key)
        assert_loaded(model, seed)
    with pytest.raises(ConfigError, match=r'model.weights_key: .* has no "ema"'):
        load_weights(net(), path, "2", "ema")
    # As prefixes in one state dict.
    torch.save(prefixed("student.") | prefixed("teacher.", 2), path)
    with pytest.raises(ConfigError, match=r"several sets .*: student, teacher; set"):
        load_weights(net(), path, "2")
    model = net()
    section = ModelConfig(weights=str(path), weights_key="teacher")
    assert "9 of 9" in start_from_weights(path, model, section, 4, seed=0)
    assert_loaded(model, 2)
    with pytest.raises(ConfigError, match=r"does nothing without model.weights"):
        start_from_weights(None, net(), ModelConfig(weights_key="a"), 4, seed=0)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_put_together(kind: str, tmp_path: Path) -> None:
    tensors = source()
    names = list(tensors)
    index = tmp_path / ("model" if kind == "safetensors" else "pytorch_model")
    index = index.with_suffix(f".{kind}.index.json")
    weight_map = {}
    for number, part in enumerate((names[:4], names[4:])):
        file = f"part-{number}.{kind}"
        shard = {name: tensors[name] for name in part}
        if kind == "safetensors":
            save_file(shard, tmp_path / file)
        else:
            torch.save(shard, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (index, tmp_path):
        model = net()
        load_weights(model, path, "2")
        assert_loaded(model)
    (tmp_path / f"part-1.{kind}").unlink()
    with pytest.raises(ConfigError, match=rf"part-1.{kind} cannot be read"):
        load_weights(net(), index, "2")


class Settings:
    """A class that no other program knows, and that must not be made."""

    made: ClassVar[list[object]] = []

    def __setstate__(self, state: object) -> None:
        self.made.append(state)

    def __reduce__(self) -> Any:
        return settings_of, (1,), {"a": 1}


def settings_of(value: int) -> Settings:
    Settings.made.append(value)
    return Settings()


class Slotted:
    """Its state is a tuple."""

    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


class Options(dict[str, int]):
    """As Lightning keeps its hyperparameters."""


class Run:
    """A file that would run a program."""

    def __init__(self, function: Any, argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> Any:
        return self.call


def of_torchvision() -> dict[str, Any]:
    """A checkpoint of torchvision's training scripts: the optimizer's and the schedule's states, and the arguments."""
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.9)
    schedules = [
        torch.optim.lr_scheduler.LinearLR(optimizer),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 4]),
    ]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, schedules, [5])
    arguments = argparse.Namespace(output_dir=Path("a"), device=torch.device("cpu"))
    return {
        "model": source(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "args": arguments,
        "epoch": 3,
    }


CHECKPOINTS: dict[str, Callable[[], dict[str, Any]]] = {
    "torchvision": of_torchvision,
    "timm": lambda: {
        "arch": "resnet18",
        "state_dict": source(),
        "args": argparse.Namespace(lr=0.1),
        "amp_scaler": {"scale": 1.0},
        "metric": np.float64(3.5),
        "curve": np.arange(3),
    },
    "lightning": lambda: {
        "state_dict": prefixed("model."),
        "hyper_parameters": Options(a=1),
        "callbacks": {"a": np.float32(1), "b": Settings()},
        "lists": [deque([1]), defaultdict(list, a=[1]), {1, 2}, Counter("ab")],
    },
    "slots": lambda: {"state_dict": source(), "settings": [Slotted(), Settings()]},
}


@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_what_a_checkpoint_holds_beside_weights_is_not_made(
    kind: str, is_archive: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(CHECKPOINTS[kind](), path, _use_new_zipfile_serialization=is_archive)
    Settings.made.clear()
    model = net()
    load_weights(model, path, "2")
    assert_loaded(model)
    assert not Settings.made


def test_a_file_with_code_in_it_is_explained_and_runs_nothing(tmp_path: Path) -> None:
    path, mark = tmp_path / "a.ckpt", tmp_path / "ran"
    for function, argument in (
        (os.system, f"touch {mark}"),
        (eval, f"open({str(mark)!r}, 'w')"),
        (Path.touch, mark),
    ):
        with suppress(ConfigError):
            torch.save({"state_dict": source(), "x": Run(function, argument)}, path)
            load_weights(net(), path, "2")
        assert not mark.exists()
    # A whole model has no weights that could be read by themselves.
    torch.save({"model": net()}, path)
    with pytest.raises(ConfigError) as caught:
        load_weights(net(), path, "2")
    message = str(caught.value)
    name = "torch.nn.modules.container.Sequential"
    assert f"(a {name})" in message or "(a torch.nn.modules." in message
    assert "add_safe_globals([torch.nn.modules." in message
    assert "\n" not in message


def test_a_prefix_is_stripped_by_name(tmp_path: Path) -> None:
    """As MoCo's two encoders, one of which is meant."""
    path = tmp_path / "a.pth"
    other = {n: t for n, t in source(2).items() if not n.startswith("2.")}
    tensors = prefixed("module.encoder_q.")
    tensors |= {f"module.encoder_k.{name}": tensor for name, tensor in other.items()}
    torch.save({"state_dict": tensors, "epoch": 3}, path)
    for key, seed in (
        ("state_dict.module.encoder_q", 1),
        ("module.encoder_k", 2),
        ("encoder_k.", 2),
        ("encoder_q", 1),
    ):
        model = net()
        note = load_weights(model, path, "2", key)
        for name, tensor in (other if seed == 2 else source()).items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert 'names without "module.encoder_' in note


def test_a_file_of_another_model_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    other = nn.Sequential(net()[0], nn.Conv2d(4, 5, 3), nn.Linear(7, 7)).state_dict()
    torch.save({"model": {f"module.{k}": v for k, v in other.items()}}, path)
    deeper = nn.Sequential(net()[0], nn.Linear(4, 4), nn.Linear(16, 4))
    with pytest.raises(ConfigError) as caught:
        load_weights(deeper, path, "2")
    message = str(caught.value)
    assert (
        "lacks 2 of the model's 11 tensors: 1.weight (another shape), 1.bias" in message
    )
    assert "7 fit by name and shape, at best" in message
