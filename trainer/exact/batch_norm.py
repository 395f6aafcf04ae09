"""The modes of a model's norm layers: which of them train, which are frozen, and with what momentum.

`trainer.exact.running_statistics` has how running statistics stay right on several ranks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from trainer.config.model_sections import BatchNormConfig
from trainer.errors import ConfigError

TORCH_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def configure(
    model: nn.Module, section: BatchNormConfig, *, ranks: int, device: torch.device
) -> nn.Module:
    """The model with its norm layers in the mode that the config asks for. Call it before DDP wraps the model.

    Raises `ConfigError` where a layer cannot be in that mode.
    """
    if section.momentum is not None:
        for layer in norm_layers(model):
            layer.momentum = section.momentum
    for name, layer in named_norm_layers(model):
        refuse_cumulative_average(name, layer)
    # In eval mode a GPU has no use for the other processes, and DDP takes them there.
    is_fixed = section.mode == "frozen" and device.type != "cpu"
    if ranks > 1 and section.mode != "sync" and not is_fixed:
        _refuse_sync_layers(model, device)
    if section.mode == "frozen":
        _refuse_layers_without_statistics(model)
        for layer in norm_layers(model):
            freeze(layer)
    if section.mode == "sync":
        if device.type == "cpu" and ranks > 1:
            raise ConfigError(
                "batch_norm.mode",
                "sync uses torch's SyncBatchNorm, which runs on GPUs only; use batch_norm.mode=micro on the CPU",
            )
        _refuse_layers_of_ones_own(model)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return model


def norm_layers(model: nn.Module) -> list[_NormBase]:
    """The layers of `model` that keep running statistics."""
    return [layer for _, layer in named_norm_layers(model)]


def named_norm_layers(model: nn.Module) -> list[tuple[str, _NormBase]]:
    """The layers of `model` that keep running statistics, each with its name."""
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None:
            layers.append((name, layer))
    return layers


def freeze(layer: nn.Module) -> None:
    """Fix a norm layer's weights and statistics."""
    layer.requires_grad_(False)
    hold_in_eval(layer)


def hold_in_eval(module: nn.Module) -> None:
    """Keep the module and its submodules in eval mode, even when `train()` is called on a model that contains it."""
    module.eval()
    # An instance attribute hides the class's method: `train` of the parent calls this one. No bound method, which
    # pickle would look for in the module's class.
    module.train = partial(_stay, module)  # type: ignore[method-assign]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def is_held(module: nn.Module) -> bool:
    """True after `hold_in_eval`."""
    return getattr(vars(module).get("train"), "func", None) is _stay


def release(module: nn.Module) -> None:
    """Undo `hold_in_eval`: the next `train()` reaches the module again."""
    del module.train


def refuse_cumulative_average(name: str, layer: _NormBase) -> None:
    """Raise `ConfigError` if the layer keeps running statistics and has no momentum."""
    if layer.running_mean is not None and layer.momentum is None:
        raise ConfigError(
            "batch_norm.momentum",
            f'layer "{name}" has momentum=None, a cumulative average over all updates so far, which no step '
            f"size or resume can leave unchanged; set batch_norm.momentum=0.1, or use batch_norm.recalibrate",
        )


def _refuse_sync_layers(model: nn.Module, device: torch.device) -> None:
    """They wait for one another in every forward, and ranks may run unequal numbers of micro-batches."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.SyncBatchNorm):
            remedy = "leave the conversion out"
            if device.type != "cpu":
                remedy += ", or set batch_norm.mode=sync"
            raise ConfigError(
                "batch_norm.mode",
                f'layer "{name}" of the model is a SyncBatchNorm already, which normalises over all processes; '
                f"{remedy}",
            )


def _refuse_layers_of_ones_own(model: nn.Module) -> None:
    """A converted layer computes what torch's does: an activation within, say, would be lost."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and type(layer).forward not in TORCH_FORWARDS:
            raise ConfigError(
                "batch_norm.mode",
                f'sync would replace layer "{name}", a {type(layer).__name__} with a forward of its own, by torch\'s '
                f"SyncBatchNorm; use batch_norm.mode=micro, or convert the model yourself",
            )


def _refuse_layers_without_statistics(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise ConfigError(
                "batch_norm.mode",
                f'layer "{name}" keeps no running statistics (track_running_stats=False), so there are none to '
                f"freeze; use batch_norm.mode=micro, or let it keep them",
            )
