"""Import path, torchvision name or `small_cnn` → a model with the run's initial weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trainer.components.weights import torchvision_weights
from trainer.config.registry import build, resolve
from trainer.config.schema import ModelConfig
from trainer.errors import ConfigError, nearest
from trainer.exact.seeding import key, preserved_cpu_generators, seed_cpu

AUXILIARY = ("googlenet", "inception_v3")  # torchvision's with further heads, which a loss of one output cannot take


def small_cnn(num_classes: int, in_channels: int = 1, width: int = 32) -> nn.Sequential:
    """A convolutional net with BatchNorm for small images, `(N, in_channels, H, W)` → `(N, num_classes)`."""
    if width < 1:
        raise ValueError(f"width must be 1 or more, not {width}")

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(in_channels, width),
        nn.MaxPool2d(2),
        *block(width, 2 * width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
    )


def build_model(section: ModelConfig, *, seed: int, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """The model that `model.name` names, its initial weights a function of `seed` alone.

    `num_classes` (from the config, else from the data) and `in_channels` (from the data) are supplied to
    models that take them; the section's other keys are the model's arguments.
    """
    supplied: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    supplied = {name: value for name, value in supplied.items() if value is not None}
    constructor = _constructor(section, supplied)
    supplied = {name: value for name, value in supplied.items() if name not in section.args}
    with preserved_cpu_generators():
        seed_cpu(key(seed, "weights"))
        model = build("model", constructor, section.args, **supplied)
    if not isinstance(model, nn.Module):
        raise ConfigError("model.name", f'"{section.name}" made {type(model).__name__}, not a torch.nn.Module')
    return model


def _constructor(section: ModelConfig, supplied: dict[str, Any]) -> Callable[..., Any]:
    name = section.name
    if "." in name or name == "small_cnn":
        if name.startswith("timm.") and "in_channels" in supplied:
            supplied["in_chans"] = supplied.pop("in_channels")  # its word for it
        constructor: Callable[..., Any] = resolve("model", name, {"small_cnn": small_cnn})
        if getattr(constructor, "__init__", None) is nn.Module.__init__:  # it looks as if it took any argument
            supplied.clear()
        return constructor
    from torchvision import models

    supplied.pop("in_channels", None)  # torchvision's models take three
    try:
        builder: Callable[..., Any] = models.get_model_builder(name)
    except ValueError:
        known = ["small_cnn", *models.list_models()]
        raise ConfigError(
            "model.name",
            f'"{name}" is neither small_cnn, a torchvision model nor an import path{nearest(name, known)}',
        ) from None
    supplied |= _as_weights_need(section)
    if "weights_backbone" in inspect.signature(builder).parameters:
        supplied["weights_backbone"] = None  # else torchvision downloads some unasked
    return builder


def compile_model(model: nn.Module, *, bitwise: bool) -> None:
    """Compile a model in place. `bitwise`: each shape's kernels depend on that shape alone, and not on those before it.

    Left to itself, torch.compile makes kernels for any shape once it has seen a second one, and no more kernels at all
    after a number of shapes; which shapes a rank sees first depends on the number of ranks.
    """
    model.compile(dynamic=False if bitwise else None)


def _as_weights_need(section: ModelConfig) -> dict[str, Any]:
    """What torchvision's builders set when they load weights themselves, which they do not here."""
    arguments: dict[str, Any] = {}
    if section.name in AUXILIARY:
        arguments |= {"aux_logits": False, "init_weights": True}  # true is the default, without its warning
    weights = torchvision_weights(section)
    if weights is not None and section.name in AUXILIARY:
        arguments |= {"transform_input": True, "init_weights": False}
    if weights is not None and section.name.startswith("vit_"):
        arguments["image_size"] = weights.meta["min_size"][0]
    return arguments


def input_channels(inputs: Any) -> int | None:
    """Channels of images `(N, C, H, W)`; None for what are not images."""
    return inputs.shape[1] if isinstance(inputs, Tensor) and inputs.dim() == 4 else None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters in all, and those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
