"""Models by name: `small_cnn`, one of torchvision's, or an import path; with the run's initial weights."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trainer.components.pooling import AdaptiveAvgPool2d
from trainer.components.resnet9 import ResNet9
from trainer.components.small_models import (
    conv_block,
    small_detector,
    small_segmenter,
)
from trainer.components.weights import torchvision_weights
from trainer.config.model_sections import ModelConfig
from trainer.config.registry import build, refuse_other_class, resolve
from trainer.errors import ConfigError, nearest
from trainer.exact.seeding import key, preserved_cpu_generators, seed_cpu

TORCHVISION_CHANNELS = 3  # of images that its models take, without a choice
# Python's own words, of a call within a function that takes any argument.
UNEXPECTED_ARGUMENT = re.compile(r"unexpected keyword argument '(\w+)'")
NO_CLASSES = (
    "the model needs it, and the data do not name their classes; set it to the number of outputs, as in "
    "model.num_classes=10, or give the data set a list `classes`"
)
# Of torchvision; a loss of one output cannot take more.
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def small_cnn(num_classes: int, in_channels: int = 1, width: int = 32) -> nn.Sequential:
    """A convolutional net with BatchNorm for small images, `(N, in_channels, H, W)` → `(N, num_classes)`."""
    if width < 1:
        raise ValueError(f"width must be 1 or more, not {width}")
    return nn.Sequential(
        *conv_block(in_channels, width),
        nn.MaxPool2d(2),
        *conv_block(width, 2 * width),
        AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
    )


SMALL_MODELS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": small_cnn,
    "resnet9": ResNet9,
    "small_segmenter": small_segmenter,
    "small_detector": small_detector,
}


def build_model(
    section: ModelConfig, *, seed: int, num_classes: int | None, in_channels: int | None
) -> nn.Module:
    """The model that `model.name` names, its initial weights a function of `seed` alone.

    `num_classes` (from the config, else from the data) and `in_channels` (from the data) are supplied to models that
    take them; the section's other keys are the model's arguments.
    """
    supplied: dict[str, Any] = {}
    if num_classes is not None:
        supplied["num_classes"] = num_classes
    if in_channels is not None:
        supplied["in_channels"] = in_channels
    constructor, supplied = _constructor(section, supplied)
    for name in section.args:
        supplied.pop(name, None)
    try:
        # The caller's own draws go on as if no model had been built.
        with preserved_cpu_generators():
            model = _call(constructor, section.args, supplied, seed)
    except ConfigError as error:
        if error.key == "model.num_classes" and num_classes is None:
            raise ConfigError(error.key, NO_CLASSES) from None
        raise
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "model.name",
            f'"{section.name}" made {type(model).__name__}, not a torch.nn.Module',
        )
    return model


def _call(
    constructor: Callable[..., Any],
    arguments: dict[str, Any],
    supplied: dict[str, Any],
    seed: int,
) -> Any:
    """What the constructor makes; without what was supplied unasked, if it passes that on to one that refuses it."""
    seed_cpu(key(seed, "weights"))
    try:
        return build("model", constructor, arguments, **supplied)
    except ConfigError as error:
        match = UNEXPECTED_ARGUMENT.search(str(error.__cause__ or ""))
        if match is None or match[1] not in supplied:
            raise
        fewer = {name: supplied[name] for name in supplied if name != match[1]}
    return _call(constructor, arguments, fewer, seed)


def _constructor(
    section: ModelConfig, supplied: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What makes the model, and what to supply it with."""
    if section.name in SMALL_MODELS:
        return SMALL_MODELS[section.name], supplied
    if "." not in section.name:
        return _torchvision_builder(section, supplied)
    constructor: Callable[..., Any] = resolve("model", section.name, {})
    refuse_other_class("model", section.name, constructor, nn.Module)
    if _is_of_transformers(constructor):
        return _from_configuration(constructor), _in_its_words(supplied)
    if section.name.endswith(".from_pretrained"):
        # It passes any argument on to a configuration, which has other words or none.
        supplied = _named_by_signature(constructor, supplied)
    # By its signature it takes any argument.
    if getattr(constructor, "__init__", None) is nn.Module.__init__:
        return constructor, {}
    if section.name.startswith("timm.") and "in_channels" in supplied:
        supplied["in_chans"] = supplied.pop("in_channels")  # timm's word for it
    return constructor, supplied


def _is_of_transformers(constructor: Any) -> bool:
    """True for a class whose models are built of a configuration, such as `transformers.ViTForImageClassification`."""
    base = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    if base is None or not isinstance(constructor, type):
        return False
    return issubclass(constructor, base)


def _in_its_words(supplied: dict[str, Any]) -> dict[str, Any]:
    words = {"num_classes": "num_labels", "in_channels": "num_channels"}
    return {words[name]: value for name, value in supplied.items()}


def _from_configuration(model_class: Any) -> Callable[..., Any]:
    """A function that makes a model of transformers with random weights, of its configuration's arguments.

    The function raises `TypeError` for a name that the configuration does not have: it would keep it, and nothing would
    read it.
    """
    config_class = model_class.config_class
    known = config_class()

    def make(**arguments: Any) -> Any:
        for name in arguments:
            # What begins with "_" is not meant to be set: it may choose which code runs.
            if name.startswith("_") or not hasattr(known, name):
                raise TypeError(
                    f"{config_class.__name__} got an unexpected keyword argument '{name}'"
                )
        return model_class(config_class(**arguments))

    make.__name__ = model_class.__name__
    return make


def _named_by_signature(
    constructor: Callable[..., Any], supplied: dict[str, Any]
) -> dict[str, Any]:
    parameters = inspect.signature(constructor).parameters
    return {name: value for name, value in supplied.items() if name in parameters}


def _torchvision_builder(
    section: ModelConfig, supplied: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    from torchvision import models

    name = section.name
    try:
        builder: Callable[..., Any] = models.get_model_builder(name)
    except ValueError:
        known = [*SMALL_MODELS, *models.list_models()]
        raise ConfigError(
            "model.name",
            f'"{name}" is neither small_cnn, a torchvision model nor an import path{nearest(name, known)}',
        ) from None
    channels = supplied.pop("in_channels", None)
    if channels not in (None, TORCHVISION_CHANNELS):
        raise ConfigError(
            "model.name",
            f"torchvision's {name} takes images of {TORCHVISION_CHANNELS} channels, and the data's have {channels}; "
            f"add {{name: RGB}} to data.train_transforms and data.val_transforms",
        )
    supplied |= _arguments_for_weights(section)
    if "weights_backbone" in inspect.signature(builder).parameters:
        supplied["weights_backbone"] = None  # the default would download some
    return builder, supplied


def _arguments_for_weights(section: ModelConfig) -> dict[str, Any]:
    """What torchvision's builders set when they load weights themselves, which they do not here."""
    arguments: dict[str, Any] = {}
    weights = torchvision_weights(section)
    if section.name in WITH_AUXILIARY_HEADS:
        arguments["aux_logits"] = False
        # Given, so that torchvision does not warn about its default.
        arguments["init_weights"] = weights is None
        if weights is not None:
            arguments["transform_input"] = True
    if weights is not None and section.name.startswith("vit_"):
        arguments["image_size"] = weights.meta["min_size"][0]
    return arguments


def input_channels(inputs: Any) -> int | None:
    """Channels of images `(N, C, H, W)`; None for anything else."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        return None
    return inputs.shape[1]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters there are, and how many of them are trained."""
    total, trainable = 0, 0
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
    return total, trainable
