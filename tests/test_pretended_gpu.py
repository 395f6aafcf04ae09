"""What can be shown of a GPU without one: no host wait in a step, two copies a forward, all state on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._pytree import tree_leaves

from tests.distributed import small
from tests.distributed.ranks import on_ranks
from tests.pretended import CUDA, DeviceLog, pretended_cuda, run_backward
from trainer import Config, Trainer
from trainer.components.models import small_cnn
from trainer.data.datasets import ImageArrays, MapDataset
from trainer.exact.refused import REFUSED
from trainer.process.host_group import HostGroup
from trainer.process.levels import all_ranks
from trainer.process.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore")


class Bilinear(nn.Module):
    """`(N, C, 6, 6)` → `(N, C · 11 · 11)`."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, size=(11, 11), mode="bilinear").flatten(1)


class OneGpu(Ranks):
    """One process on the pretended device, without Accelerate."""

    def __init__(self, precision: str, timeout: float) -> None:
        self.rank, self.count, self.is_main, self.device = 0, 1, True, CUDA
        self._host = HostGroup(0, 1, timeout)
        self.accelerator: Any = SimpleNamespace(
            no_sync=lambda model: nullcontext(), free_memory=lambda: None
        )

    def prepare(self, model: nn.Module) -> nn.Module:
        return model


def in_a_fork(test: Callable[..., None]) -> Callable[..., None]:
    """The test in a process of its own: where autograd has met the pretended device, no later fork can use autograd."""

    @wraps(test)
    def run(**arguments: Any) -> None:
        on_ranks(1, test, **arguments)

    return run


def config(directory: Path, **changes: Any) -> Config:
    """fp32, plain SGD, logged as seldom as by default."""
    settings: dict[str, Any] = {
        "batch__size": 32,
        "batch__micro_size": 8,
        "optimizer__lr": 0.02,
        "optimizer__momentum": None,
        "train__precision": "fp32",
        "train__epochs": 1,
        "train__log_every": None,
        "best__metric": "train/loss",
    }
    return small.config(directory, **(settings | changes))


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("trainer.core.build.Ranks", OneGpu)
    # It asks the driver.
    monkeypatch.setattr("trainer.core.build.check_ranks", lambda config, ranks: [])
    # Random states are numbers, which fake tensors do not have.
    monkeypatch.setattr("trainer.exact.fuse.Fused._check_draws", lambda self: None)
    monkeypatch.setattr(
        "trainer.core.build_input.signature_of_samples", lambda *args, **kwargs: None
    )
    yield


class SeveralSizes:
    """Images whose heights differ."""

    def __len__(self) -> int:
        return 32 * 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 8 + index % 5, 9, dtype=torch.uint8), index % 10


def train(
    directory: Path,
    steps: int = 3,
    model: nn.Module | None = None,
    data: MapDataset | None = None,
    **changes: Any,
) -> tuple[Trainer, DeviceLog]:
    """A trainer after some steps, and what the last of them did on the device."""
    if data is None:
        images = torch.randint(256, (32 * 6, 1, 8, 8), dtype=torch.uint8)
        data = ImageArrays(images, torch.randint(10, (len(images),)))
    trainer = Trainer(
        config(directory, **changes), model=model or small_cnn(10), train_data=data
    )
    trainer.fuse = int(trainer.config.batch.fuse)
    # How often each layer is called is counted on the host in the first step, once.
    statistics = trainer.reduction._statistics
    statistics._modes = [layer.is_training for layer in statistics._layers]
    # So is which buffers move; here none does.
    moving = trainer.reduction._moving
    moving._is_first_step, moving._still = False, moving._candidates
    with trainer.run.settings():
        trainer.start()
        for number in range(steps):
            with DeviceLog() as log:
                trainer.train_step(trainer.plan.step(number))
                trainer.meter.flush()
    return trainer, log


SETTINGS: list[dict[str, Any]] = [
    {},
    {"train__precision": "bf16", "train__max_grad_norm": 1.0},
    {"train__precision": "fp16"},
    {
        "train__precision": "fp16",
        "train__max_grad_norm": 1.0,
        "optimizer__name": "adamw",
    },
    {"batch__fuse": 4},
    {"loss__class_weights": [1.0] * 10},
    {"loss__ignore_index": 3},
    {"loss__class_weights": [1.0] * 10, "loss__ignore_index": 3},
    {"run__reproducibility": "bitwise"},
    {
        "run__reproducibility": "bitwise",
        "train__find_unused_parameters": True,
        "optimizer__name": "adamw",
    },
    {"batch_norm__momentum_per": "step"},
    {"batch_norm__mode": "frozen"},
    {"train__channels_last": True},
    {
        "train__channels_last": True,
        "run__reproducibility": "bitwise",
        "train__max_grad_norm": 1.0,
    },
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@in_a_fork
def test_no_step_waits_for_the_device(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pretended_cuda():
        trainer, log = train(tmp_path, **changes)
    assert not log.blocking_copies
    assert log.copies == 2 * (4 // trainer.fuse), (
        "inputs and targets of each forward, and nothing else"
    )
    state = [
        *trainer.module.parameters(),
        *trainer.module.buffers(),
        *tree_leaves(dict(trainer.optimizer.state)),
    ]
    assert {tensor.device for tensor in state if isinstance(tensor, Tensor)} == {CUDA}
    if "train__channels_last" in changes:
        assert all(
            p.is_contiguous(memory_format=torch.channels_last)
            for p in trainer.module.parameters()
            if p.dim() == 4
        )


BATCH_TRANSFORMS = [
    {"name": "RandomCrop", "size": 8, "padding": 2, "fill": [3]},
    {"name": "RandomHorizontalFlip"},
    {"name": "RandomVerticalFlip"},
    {"name": "ColorJitter", "brightness": 0.4, "saturation": 0.5, "hue": 0.1},
    {"name": "RandomGrayscale"},
    {"name": "RandomResizedCrop", "size": 8},
    {"name": "RandomErasing"},
    {"name": "RandomCrop", "size": 8, "padding": 2, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("on_device", [False, True])
@in_a_fork
def test_images_are_transformed_and_looked_up_without_waiting(
    tmp_path: Path, on_device: bool
) -> None:
    with (
        pretended_cuda(),
        patch("trainer.data.batch_transforms.base.check_hash"),
        patch("trainer.core.device_sets.free_memory", lambda device: None),
        patch("trainer.core.device_sets.device_name", lambda device: "a GPU"),
    ):
        _, log = train(
            tmp_path,
            data__batch_transforms=BATCH_TRANSFORMS,
            data__on_device=on_device,
            data__workers=2 if on_device else 0,
        )
    assert not log.blocking_copies
    # The ids, and without data.on_device inputs and targets too, of each forward.
    assert log.copies == (1 if on_device else 3) * 4


@in_a_fork
def test_images_of_several_sizes_become_one_size_without_waiting(
    tmp_path: Path,
) -> None:
    with (
        pretended_cuda(),
        patch("trainer.data.batch_transforms.base.check_hash"),
    ):
        _, log = train(
            tmp_path,
            data=SeveralSizes(),
            data__batch_transforms=[{"name": "RandomResizedCrop", "size": 8}],
        )
    assert not log.blocking_copies
    # The images in one buffer, targets, ids and sizes, of each forward.
    assert log.copies == 4 * 4


class FirstOfFour(OneGpu):
    """The first of four processes, each on a pretended device. What the others would send is not pretended."""

    def __init__(self, precision: str, timeout: float) -> None:
        super().__init__(precision, timeout)
        self.count = 4
        self.levels = [all_ranks(4)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__find_unused_parameters": True},
        {"loss__class_weights": [1.0] * 10, "loss__ignore_index": 3},
        {"train__channels_last": True, "train__max_grad_norm": 1.0},
    ],
    ids=str,
)
@in_a_fork
def test_no_bitwise_exchange_waits_for_the_device(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """14 micro-batches on four ranks: this one holds two nodes of the tree."""
    collectives = (
        "broadcast",
        "all_reduce",
        "all_to_all_single",
        "all_gather_into_tensor",
    )
    with ExitStack() as stack:
        stack.enter_context(patch("trainer.core.build.Ranks", FirstOfFour))
        stack.enter_context(patch("trainer.core.build_input.check_data"))
        for name in collectives:
            stack.enter_context(patch.object(torch.distributed, name))
        stack.enter_context(pretended_cuda())
        trainer, log = train(
            tmp_path,
            run__reproducibility="bitwise",
            batch__size=28,
            batch__micro_size=2,
            **changes,
        )
    first, end = trainer.plan.step(0).ranks[0]
    assert not log.blocking_copies
    assert log.copies == 2 * (end - first)
    for parameter in trainer.module.parameters():
        assert parameter.device == CUDA


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
    ],
)
@in_a_fork
def test_a_wait_is_noticed(tmp_path: Path, wait: Any) -> None:
    class Waits(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            wait(out.detach())
            return out

    with (
        pretended_cuda(),
        pytest.raises((DataDependentOutputException, DynamicOutputShapeException)),
    ):
        train(tmp_path, 1, nn.Sequential(nn.Flatten(), Waits(64, 10)))


@in_a_fork
def test_a_copy_to_the_host_is_noticed(tmp_path: Path) -> None:
    class Copies(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            out.detach().cpu()
            return out

    with pretended_cuda():
        _, log = train(tmp_path, 1, nn.Sequential(nn.Flatten(), Copies(64, 10)))
    assert log.blocking_copies.count((8, 10)) == 4  # one a micro-batch


@in_a_fork
def test_the_pretended_backward_is_the_engines() -> None:
    torch.manual_seed(0)
    one, two = small_cnn(10), small_cnn(10)
    two.load_state_dict(one.state_dict())
    images = torch.randn(4, 1, 8, 8)
    one(images).square().sum().backward()
    run_backward(two(images).square().sum())
    for ours, theirs in zip(two.parameters(), one.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    "model",
    [small_cnn(10), nn.Sequential(nn.Conv2d(1, 2, 3), Bilinear(), nn.Linear(242, 10))],
)
@in_a_fork
def test_bitwise_runs_nothing_that_cuda_refuses(
    tmp_path: Path, model: nn.Module
) -> None:
    """As CUDA is dispatched to: torch's functions replace some operations there, such as bilinear interpolation."""
    with pretended_cuda():
        _, log = train(tmp_path, 2, model, run__reproducibility="bitwise")
    operations = {
        name.removeprefix("aten.").partition(".")[0] for name in log.operations
    }
    assert "convolution_backward" in operations
    assert not operations & REFUSED.keys()
