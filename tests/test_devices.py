"""Devices other than the CPU and CUDA, pretended: they take CUDA's path, or are refused with a way out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, conv_net
from trainer import Config, ConfigError, Step, Trainer
from trainer.config.data_section import DataConfig
from trainer.core import build
from trainer.data import loading
from trainer.data.batches import MicroBatch, Request
from trainer.data.datasets import ImageArrays
from trainer.data.loading import Loader, Normalize
from trainer.data.samples import KeyedDataset
from trainer.exact.seeding import device_generator, device_seeder, preserved_generators
from trainer.inspection.watch import StepWatch
from trainer.process import device as devices
from trainer.process.device import (
    check_precision,
    check_process_count,
    check_reproducibility,
    chosen_kind,
    default_generator,
)
from trainer.process.machine import describe_device
from trainer.process.ranks import Ranks
from trainer.process.restart import _backend

CPU = torch.device("cpu")
KINDS = ("cpu", "cuda", "xpu", "mps")


def is_refused(check: Any, *arguments: Any) -> bool:
    try:
        check(*arguments)
    except ConfigError as error:
        assert "ACCELERATE_USE_CPU=true" in error.message
        assert str(arguments[0]) in error.message
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_of_device_cannot_do_is_refused_with_a_way_out(kind: str) -> None:
    assert is_refused(check_precision, kind, "fp64") == (kind == "mps")
    assert not is_refused(check_precision, kind, "bf16")
    assert is_refused(check_process_count, kind, 2) == (kind == "mps")
    assert not is_refused(check_process_count, kind, 1)
    bitwise = is_refused(check_reproducibility, kind, "bitwise")
    assert bitwise == (kind in ("xpu", "mps"))
    assert not is_refused(check_reproducibility, kind, "standard")


def pretend(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch say that the machine has a device of this kind."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda: torch.device(kind)
    )


@pytest.mark.parametrize(
    ("kind", "backend"), [("cuda", "nccl"), ("xpu", "xccl"), ("cpu", "gloo")]
)
def test_ranks_meet_over_the_devices_own_backend(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(kind, monkeypatch)
    assert chosen_kind() == kind
    assert _backend() == backend
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert (chosen_kind(), _backend()) == ("cpu", "gloo")


def test_several_processes_on_mps_are_refused_before_they_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend("mps", monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE: 2 processes .* on mps; start"):
        Ranks("fp32")


def fit_bitwise_on(kind: str, directory: Path) -> str:
    """What a bitwise run says whose ranks are on a device of this kind."""

    class Pretended(Ranks):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.device = torch.device(kind)

    build.Ranks = Pretended  # type: ignore[misc]
    try:
        Trainer(config(directory, run__reproducibility="bitwise"))
    except ConfigError as error:
        return str(error)
    return ""


def config(directory: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "figures": False},
        "batch": {"size": 8, "micro_size": 4},
        "train": {"epochs": 1, "max_steps": 3, "log_every": 2},
        "wandb": {"mode": "disabled"},
        "best": {"metric": "train/loss"},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree.setdefault(section, {})[key] = value
    return Config.from_dict(tree)


def test_a_bitwise_run_on_mps_is_refused(tmp_path: Path) -> None:
    (message,) = on_ranks(1, fit_bitwise_on, "mps", tmp_path)
    assert message.startswith("run.reproducibility: bitwise needs deterministic")


# ---------------------------------------------------------------- generators


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_gpus_generator_is_seeded_and_put_back(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator()
    module = torch.get_device_module(kind)
    if kind == "mps":
        monkeypatch.setattr(module, "_get_default_mps_generator", lambda: generator)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    else:
        monkeypatch.setattr(module, "default_generators", (generator,))
        monkeypatch.setattr(module, "current_device", lambda: 0)
        monkeypatch.setattr(module, "is_initialized", lambda: True)
    device = torch.device(kind)
    assert device_generator(device) is generator

    device_seeder(device)(17)
    assert generator.initial_seed() == 17
    assert torch.default_generator.initial_seed() == 17

    before = generator.get_state()
    with preserved_generators():
        torch.rand(5, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_an_unknown_kind_has_no_generator_of_its_own() -> None:
    assert default_generator(torch.device("meta")) is None
    assert device_seeder(torch.device("meta")) is torch.manual_seed


# ---------------------------------------------------------------- copies


class Stream:
    """Stands for every stream, and notes what it is asked for."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def record_event(self) -> str:
        return "end of copy"

    def wait_event(self, event: str) -> None:
        self._log.append(f"wait for {event}")


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_micro_batches_are_copied_ahead_where_there_are_streams(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    device = torch.device(kind)
    module = torch.get_device_module(kind)

    def copy(batch: MicroBatch, to: torch.device, non_blocking: bool = False) -> Any:
        assert to == device
        log.append(f"copy {batch.first}{' ahead' if non_blocking else ''}")
        return batch

    def pin(batch: MicroBatch) -> MicroBatch:
        log.append(f"pin {batch.first}")
        return batch

    if kind != "mps":
        monkeypatch.setattr(module, "Stream", lambda _: Stream(log))
        monkeypatch.setattr(module, "stream", lambda _: nullcontext())
        monkeypatch.setattr(module, "current_stream", lambda: Stream(log))
    monkeypatch.setattr(loading, "send_to_device", copy)
    monkeypatch.setattr(loading, "_pin", pin)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    images = ImageArrays(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4))
    data = KeyedDataset(images, None, seed=0, purpose="train")
    loader = Loader(data, DataConfig(), device, Normalize(None, None, torch.float32))
    requests = [Request(index, 0, np.arange(2), 1) for index in range(2)]
    for batch in loader.run(requests):
        log.append(f"use {batch.first}")
    if kind == "mps":
        assert log == ["copy 0", "use 0", "copy 1", "use 1"]
    else:
        assert log == [
            *("pin 0", "copy 0 ahead", "pin 1", "copy 1 ahead"),
            *("wait for end of copy", "use 0", "wait for end of copy", "use 1"),
        ]


# ---------------------------------------------------------------- fp64, which MPS lacks


class Fp64(TorchDispatchMode):
    """Records the operations that give tensors in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
                self.operations.add(str(function))
        return result


def operations_in_fp64(directory: Path, kinds: tuple[str, ...]) -> set[str]:
    """Those of a run's steps, rows and evaluations where `kinds` of devices have no fp64."""
    devices.KINDS_WITHOUT_FP64 = kinds  # type: ignore[assignment]
    mode = Fp64()

    class Watched(Trainer):
        def train_step(self, step: Step) -> None:
            with mode:
                super().train_step(step)

        def measure(self, step: Step) -> Any:
            with mode:
                return super().measure(step)

        def evaluate(self) -> Any:
            with mode:
                return super().evaluate()

    changes = {
        "batch_norm__recalibrate": 2,
        "train__max_grad_norm": 1.0,
        "loss__class_weights": [1.0, 2.0, 3.0, 4.0],
    }
    data = Images(24)
    data.points = data.points.float()
    Watched(
        config(directory, **changes), model=conv_net(), train_data=data, val_data=data
    ).fit()
    return mode.operations


def test_nothing_is_summed_in_fp64_where_the_device_has_none(tmp_path: Path) -> None:
    """The CPU stands for MPS; where it is itself, sums are in fp64."""
    (without,) = on_ranks(1, operations_in_fp64, tmp_path / "a", ("cpu", "mps"))
    assert without == set()
    (with_fp64,) = on_ranks(1, operations_in_fp64, tmp_path / "b", ("mps",))
    assert "aten.sum.default" in with_fp64 or "aten.zeros.default" in with_fp64


def test_a_step_is_not_taken_apart_without_fp64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Images(8)
    data.points = data.points.float()
    trainer = Trainer(config(tmp_path), model=conv_net(), train_data=data)
    StepWatch(trainer, detailed=True)
    monkeypatch.setattr(devices, "KINDS_WITHOUT_FP64", ("cpu",))
    with pytest.raises(ConfigError, match=r"cpu has no fp64.*ACCELERATE_USE_CPU=true"):
        StepWatch(trainer, detailed=True)


def test_a_gpu_of_any_maker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "Arc")
    assert describe_device(torch.device("xpu"))["device"] == "Arc"
    assert describe_device(torch.device("mps"))["device"] == "mps"
    assert describe_device(CPU)["device"] == "cpu"
