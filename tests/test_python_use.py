"""A program's own state and arguments: none changes a run, and what cannot be used is one message."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.small import HASHES, Images, Points, config, conv_net, mlp
from trainer import ConfigError, LockstepError, Observer, Trainer
from trainer.exact.plan import Step


def fit(directory: Path, model: nn.Module, precision: str = "fp32") -> dict[str, Any]:
    settings = config(
        directory,
        run__reproducibility="bitwise",
        train__precision=precision,
        train__max_steps=2,
        batch__micro_size=7,
    )
    data, validation = Images(28), Images(10)
    summary = Trainer(settings, model=model, train_data=data, val_data=validation).fit()
    return {name: summary[name] for name in HASHES}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_run_does_not_depend_on_the_state_of_its_program(tmp_path: Path) -> None:
    reference = fit(tmp_path / "reference", conv_net())

    model = conv_net()
    model.eval()  # it shall leave gradients alone, and no statistics
    model(Images(4).points.float()).sum().backward()
    assert fit(tmp_path / "gradients", model) == reference

    states: dict[str, AbstractContextManager[None]] = {
        "no gradients": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "float64": default_dtype(torch.float64),
    }
    for name, state in states.items():
        model = conv_net()
        with state:
            assert fit(tmp_path / name, model) == reference, name
            is_on = torch.is_autocast_enabled("cpu")
            assert is_on == (name == "autocast")  # the program's own state is back


def test_autocast_within_autocast_sees_every_update(tmp_path: Path) -> None:
    """torch keeps the weights that it has cast until the outermost autocast ends."""
    reference = fit(tmp_path / "reference", conv_net(), "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        assert fit(tmp_path / "within", conv_net(), "bf16") == reference
        depth = torch.autocast_increment_nesting()
        assert depth - 1 == torch.autocast_decrement_nesting() == 1


def test_what_cannot_be_used_is_one_message(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with torch.inference_mode():
        made_in_inference_mode = mlp()
    mistakes: list[tuple[Any, Any, str]] = [
        ({"run": {}}, mlp(), "config: .* is a dict; make one by Config.from_dict"),
        (settings, nn.Identity, r"model: Identity is a class; give an object"),
        (settings, "resnet18", "model: 'resnet18' is a str; give a torch.nn.Module"),
        (settings, made_in_inference_mode, "was made within torch.inference_mode"),
    ]
    for given, model, message in mistakes:
        with pytest.raises(ConfigError, match=message):
            Trainer(given, model=model, train_data=Points(ignored=False))


class Second(Observer):
    """In a run's first step, another thread wants to make a Trainer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.message = ""

    def step(self, step: Step) -> None:
        if not self.message:
            thread = threading.Thread(target=self.try_to_train)
            thread.start()
            thread.join()

    def try_to_train(self) -> None:
        try:
            Trainer(
                config(self.directory), model=mlp(), train_data=Points(ignored=False)
            )
            self.message = "made"
        except LockstepError as error:
            self.message = str(error)


def test_a_second_thread_is_refused_while_one_trains(tmp_path: Path) -> None:
    second = Second(tmp_path / "second")
    settings = config(tmp_path, train__max_steps=2)
    Trainer(
        settings, model=mlp(), train_data=Points(ignored=False), observers=[second]
    ).fit()
    assert "another thread of this process builds or trains" in second.message
    second.try_to_train()
    assert second.message == "made"
