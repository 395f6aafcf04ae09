"""The base learning rate of each parameter: one for the head, one for the backbone, less for earlier layers."""

from __future__ import annotations

from torch import nn

from trainer.components.heads import find_head
from trainer.components.layers import layers_of
from trainer.config.model_sections import OptimizerConfig


def base_rates(
    section: OptimizerConfig, model: nn.Module, head: str | None
) -> dict[str, float]:
    """Each parameter's learning rate before the schedule's factor; `head` is `model.head`, if it is set.

    The head has `optimizer.lr`. Everything else has `optimizer.backbone_lr` (if that is not set, `optimizer.lr`) times
    `optimizer.layer_decay` ** (number of layers after it), counting the head as the last (BEiT: Bao et al., 2022).
    """
    if section.backbone_lr is None and section.layer_decay == 1:
        return {name: section.lr for name, _ in model.named_parameters()}
    head = find_head(model, head)
    layers = layers_of(model, head)
    last = max(layers.values())
    backbone_lr = section.lr if section.backbone_lr is None else section.backbone_lr
    rates: dict[str, float] = {}
    for name, layer in layers.items():
        if name.startswith(f"{head}."):
            rates[name] = section.lr
        else:
            layers_after = last - layer
            rates[name] = backbone_lr * section.layer_decay**layers_after
    return rates


def describe_layers(
    section: OptimizerConfig, model: nn.Module, head: str | None
) -> str:
    """The layers that `layer_decay` found, for a run's header; "" where it is not set."""
    if section.layer_decay == 1:
        return ""
    layers = set(layers_of(model, find_head(model, head)).values())
    rates = base_rates(section, model, head).values()
    return f"{len(layers)} layers, lr {min(rates):.3g} to {max(rates):.3g}"
