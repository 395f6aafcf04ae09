"""Operations that CUDA refuses in bitwise mode: known before training, on the CPU, with their place and a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.programs import run_program
from trainer import Config, ConfigError, Task, Trainer
from trainer.components.models import small_cnn
from trainer.components.pooling import AdaptiveAvgPool2d
from trainer.components.task import CrossEntropy, NegativeLogLikelihood
from trainer.core.refused import refuse_nondeterministic, refused_operations
from trainer.data.datasets import ImageArrays
from trainer.exact.determinism import run_settings

CLASSES = 3


class OfSize(nn.Module):
    """Runs a function between a convolution and a mean over what is left of the image."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, CLASSES, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.convolution(x))
        return x.flatten(2).mean(2) if x.dim() > 2 else x


class Pixelwise(Task):
    """A pixel-wise cross-entropy as one writes it oneself."""

    def loss_sum(self, output: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return F.cross_entropy(output, targets, reduction="sum"), targets.numel()


def pooled_net(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def trainer_of(
    directory: Path, model: nn.Module, *, task: Task | None = None, pixels: bool = False
) -> Trainer:
    images = torch.randint(256, (24, 1, 8, 8), dtype=torch.uint8)
    targets = torch.randint(CLASSES, (24, 8, 8) if pixels else (24,))
    settings = Config.from_dict(
        {
            "run": {
                "dir": str(directory),
                "figures": False,
                "reproducibility": "bitwise",
            },
            "batch": {"size": 12, "micro_size": 6},
            "train": {"epochs": 1},
            "wandb": {"mode": "disabled"},
            "best": {"metric": "train/loss"},
        }
    )
    data: Any = (
        list(zip(images, targets, strict=True))
        if pixels
        else ImageArrays(images, targets)
    )
    return Trainer(settings, model=model, train_data=data, task=task)


def refused(trainer: Trainer) -> list[str]:
    with trainer.run.settings():
        return refused_operations(trainer.run)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.AdaptiveAvgPool2d(2), "torch.nn.AdaptiveAvgPool2d"),
        (nn.AdaptiveMaxPool2d(2), "torch.nn.AdaptiveMaxPool2d"),
        (nn.ReflectionPad2d(1), "torch.nn.ReflectionPad2d"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), "bicubic interpolation"),
        (nn.FractionalMaxPool2d(2, output_size=3), "torch.nn.FractionalMaxPool2d"),
    ],
)
def test_layers_are_named_with_their_place(
    tmp_path: Path, layer: nn.Module, name: str
) -> None:
    (line,) = refused(trainer_of(tmp_path, OfSize(layer)))
    assert line.startswith(f"{name} (in function): ")


@pytest.mark.parametrize(
    "layer",
    [
        AdaptiveAvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.MaxPool2d(2),
        nn.ReplicationPad2d(1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=2),
    ],
)
def test_what_has_a_deterministic_kernel_is_not(
    tmp_path: Path, layer: nn.Module
) -> None:
    assert refused(trainer_of(tmp_path, OfSize(layer))) == []


def test_a_backward_that_does_not_happen_is_not_refused(tmp_path: Path) -> None:
    # Pools the images themselves.
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, CLASSES))
    assert refused(trainer_of(tmp_path, model)) == []


def test_losses_of_pixels(tmp_path: Path) -> None:
    model = nn.Conv2d(1, CLASSES, 3, padding=1)
    (line,) = refused(
        trainer_of(tmp_path / "own", model, task=Pixelwise(), pixels=True)
    )
    assert line.startswith(
        "a pixel-wise cross-entropy or NLL loss (in the loss or metrics): use loss.name=cross_entropy"
    )
    assert (
        refused(trainer_of(tmp_path / "ours", model, task=CrossEntropy(), pixels=True))
        == []
    )


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, small_cnn(CLASSES))
    before = {
        name: tensor.clone() for name, tensor in trainer.module.state_dict().items()
    }
    torch.manual_seed(1)
    assert refused(trainer) == []
    assert float(torch.rand(())) == float(
        torch.rand((), generator=torch.Generator().manual_seed(1))
    )
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in trainer.module.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in trainer.module.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in trainer.module.modules()
    )


def test_a_bitwise_run_on_a_gpu_ends_before_it_begins(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, OfSize(nn.Sequential(nn.ReflectionPad2d(1), nn.AdaptiveMaxPool2d(2)))
    )
    lines = refused(trainer)
    assert len(lines) == 2
    trainer.run.ranks.device = torch.device("cuda", 0)
    with (
        patch("trainer.core.refused.refused_operations", return_value=lines),
        pytest.raises(ConfigError) as caught,
    ):
        refuse_nondeterministic(trainer.run)
    for part in (
        "run.reproducibility: bitwise",
        "torch.nn.AdaptiveMaxPool2d (in function.1)",
        "ReflectionPad2d (in",
    ):
        assert part in str(caught.value)


def test_check_says_so_without_a_gpu(tmp_path: Path) -> None:
    arguments = [
        f"model.name={__name__}.pooled_net",
        "run.reproducibility=bitwise",
        f"run.dir={tmp_path}",
    ]
    done = run_program(["-m", "trainer", "check", "configs/digits.yaml", *arguments])
    assert done.returncode == 0, done.stderr
    refusal = "on a GPU, run.reproducibility=bitwise would be refused for torch.nn.AdaptiveAvgPool2d (in 1): "
    assert refusal in " ".join(done.stdout.split())


# ---------------------------------------------------------------- equal operations


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (4, 6), (5, 3), (1, 1)])
@pytest.mark.parametrize("output", [2, (3, 1), (None, 2)])
def test_the_pooling_is_torchs(size: tuple[int, int], output: Any) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected = nn.AdaptiveAvgPool2d(output)(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    with run_settings(bitwise=True, compiled=False):
        actual = AdaptiveAvgPool2d(output)(x)
        (own_gradient,) = torch.autograd.grad(actual.square().sum(), x)
    assert torch.allclose(actual, expected, rtol=1e-14)
    assert torch.allclose(own_gradient, gradient, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last]
)
def test_windows_of_a_power_of_two_keep_every_bit(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Those of digits (2 × 2) and CIFAR-10 (8 × 8): bitwise runs of the shipped configs are what they were."""
    for size in (4, 16):
        x = (
            torch.randn(8, 64, size, size, dtype=dtype)
            .to(memory_format=memory_format)
            .requires_grad_()
        )
        results = []
        for bitwise in (False, True):
            with run_settings(bitwise=bitwise, compiled=False):
                y = AdaptiveAvgPool2d(2)(x)
                results.append(
                    (
                        y,
                        *torch.autograd.grad(
                            (y * torch.arange(4, dtype=dtype).view(2, 2) / 7).sum(), x
                        ),
                    )
                )
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("task", [CrossEntropy, NegativeLogLikelihood])
@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 3, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"class_weights": [1.0, 2.0, 0.5]}, {"ignore_index": 1}]
)
def test_losses_of_pixels_are_equal_in_both_modes(
    task: Any, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    output = torch.randn(2, CLASSES, *shape, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(CLASSES, (2, *shape))
    loss = task(**options).double()
    results = []
    for bitwise in (False, True):
        with run_settings(bitwise=bitwise, compiled=False):
            total, weight = loss.loss_sum(output.log_softmax(1), targets)
            results.append(
                (total, torch.as_tensor(weight), *torch.autograd.grad(total, output))
            )
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-13)
