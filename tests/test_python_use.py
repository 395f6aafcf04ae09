"""A program's own state and arguments: none changes a run, and what cannot be used is one message."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    redirect_stderr,
    redirect_stdout,
)
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tests.distributed.small import (
    HASHES,
    Images,
    Points,
    config,
    conv_net,
    header_of,
    mlp,
)
from trainer import Config, ConfigError, LockstepError, Observer, Run, Trainer
from trainer.exact.plan import Step

DATA, VALIDATION = Images(28), Images(10)


def fit(directory: Path, model: nn.Module, precision: str = "fp32") -> dict[str, Any]:
    settings = config(
        directory,
        run__reproducibility="bitwise",
        train__precision=precision,
        train__max_steps=2,
        batch__micro_size=7,
    )
    trainer = Trainer(settings, model=model, train_data=DATA, val_data=VALIDATION)
    summary = trainer.fit()
    return {name: summary[name] for name in HASHES}


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


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
        "device": torch.device("meta"),
        "default device": default_device("meta"),
    }
    for name, state in states.items():
        model = conv_net()
        with state:
            assert fit(tmp_path / name, model) == reference, name
            is_on = torch.is_autocast_enabled("cpu")
            assert is_on == (name == "autocast")  # the program's own state is back
            assert (torch.empty(1).device.type == "meta") == ("device" in name)
    assert torch.empty(1).device.type == "cpu"


class Arithmetic(Observer):
    """How the process computes within a run."""

    def begin(self, run: Run) -> None:
        self.seen = arithmetic()


def arithmetic() -> tuple[Any, ...]:
    mkldnn = torch.backends.mkldnn
    precisions = [part.fp32_precision for part in (mkldnn.matmul, mkldnn.conv)]
    denormal = torch.tensor(1e-310, dtype=torch.float64) * 1
    return (*precisions, bool(denormal))


def test_the_program_sets_no_arithmetic_of_a_bitwise_run(tmp_path: Path) -> None:
    observer = Arithmetic()
    trainer = Trainer(
        config(tmp_path, run__reproducibility="bitwise", train__max_steps=1),
        model=conv_net(),
        train_data=DATA,
        observers=[observer],
    )
    torch.set_float32_matmul_precision("medium")
    torch.set_flush_denormal(True)
    try:
        before = arithmetic()
        trainer.fit()
        after = arithmetic()
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_flush_denormal(False)
    assert observer.seen == ("ieee", "ieee", True)
    assert before == after != observer.seen


class OnlyWrites:
    """What programs put in the place of `sys.stdout`, to write to a file as well."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_a_program_may_have_another_stdout_or_none(tmp_path: Path) -> None:
    stdout: Any = OnlyWrites()
    for name, stream in (("writes", stdout), ("none", None)):
        with redirect_stdout(stream), redirect_stderr(stream):
            fit(tmp_path / name, conv_net())
    assert "trained" in stdout.text


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_bitwise_run_names_what_else_the_program_has_set(tmp_path: Path) -> None:
    settings = config(tmp_path, run__reproducibility="bitwise")
    trainer = Trainer(settings, model=conv_net(), train_data=DATA)
    plain = header_of(trainer, tmp_path)["bitwise"]
    with torch.backends.mkldnn.flags(enabled=False):
        line = header_of(trainer, tmp_path)["bitwise"]
    assert line == f"{plain} · torch.backends.mkldnn.enabled=False, by the program"


class Traveller(Observer):
    """Goes to another directory whenever it is called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, run: Run) -> None:
        os.chdir(self.directory)

    def step(self, step: Step) -> None:
        os.chdir(self.directory)

    def epoch(self, step: Step, row: dict[str, Any]) -> None:
        os.chdir(self.directory)


def test_relative_paths_begin_where_the_trainer_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for label, colour in (("dark", 10), ("light", 240)):
        for part, count in (("train", 8), ("val", 2)):
            folder = home / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (5, 5), (colour, i, i)).save(folder / f"{i}.png")
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    settings = config(
        Path("runs"), batch__size=4, train__checkpoint_every=1, train__epochs=2
    ).to_dict()
    settings["data"] |= {"name": "folder", "root": "images", "workers": 0}
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 2))
    trainer = Trainer(
        Config.from_dict(settings), model=model, observers=[Traveller(elsewhere)]
    )

    os.chdir(elsewhere)
    trainer.fit()
    assert Path.cwd() == elsewhere
    trainer.load_best()
    assert trainer.evaluate()
    run = home / "runs" / "run"
    assert (run / "best" / "model.safetensors").exists()
    assert (run / "checkpoints" / "last").read_text() == "step_00000008\n"
    assert list(elsewhere.iterdir()) == []


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
        (settings, nn.Linear(6, 4, device="meta"), '"weight" is on the meta device'),
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


class FailsAtFirst(Observer):
    """Ends the first step before its update, once."""

    def __init__(self) -> None:
        self.is_due = True

    def gradient(self, step: Step) -> None:
        if self.is_due:
            self.is_due = False
            raise ValueError("not now")


def of_points(directory: Path, **more: Any) -> Trainer:
    kind = more.pop("kind", Trainer)
    settings = config(directory, train__max_steps=2)
    data = Points(ignored=False)
    trainer: Trainer = kind(settings, model=mlp(), train_data=data, **more)
    return trainer


def test_a_trainer_that_failed_within_a_step_does_not_go_on(tmp_path: Path) -> None:
    """Its gradients and statistics are those of half a step."""
    trainer = of_points(tmp_path, observers=[FailsAtFirst()])
    with pytest.raises(ValueError, match="not now"):
        trainer.fit()
    with pytest.raises(LockstepError, match="has trained already; make a new one"):
        trainer.fit()


class TrainsNothing(Trainer):
    def train_step(self, step: Step) -> None:
        pass


def test_what_would_train_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LockstepError, match=r"TrainsNothing.train_step has not"):
        of_points(tmp_path, kind=TrainsNothing).fit()
    trainer = of_points(tmp_path)
    trainer.optimizer = torch.optim.Adam(trainer.module.parameters())
    with pytest.raises(LockstepError, match="was replaced by Adam after the Trainer"):
        trainer.fit()


def test_a_model_with_frozen_layers_can_be_copied_and_pickled(tmp_path: Path) -> None:
    settings = config(tmp_path, batch_norm__mode="frozen", model__freeze=["0"])
    model = Trainer(settings, model=conv_net(), train_data=DATA).module
    inputs = DATA.points[:4]
    expected = model.eval()(inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.train()
        frozen = [copied[0], copied[1]]
        assert not any(layer.training for layer in frozen) and copied[4].training
        assert torch.equal(copied.eval()(inputs), expected)
    assert model.train()[4].training
