"""The project's own model."""

from __future__ import annotations

from torch import nn


def dilated_net(in_channels: int, width: int = 16) -> nn.Sequential:
    """Images `(N, in_channels, H, W)` → a logit for each pixel, `(N, 1, H, W)`.

    Any function or class that returns a `torch.nn.Module` will do. `in_channels` is supplied from the data because
    there is a parameter of that name; so would `num_classes` be.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for dilation in (1, 2, 4, 8):
        layers.append(
            nn.Conv2d(
                channels, width, 3, padding=dilation, dilation=dilation, bias=False
            )
        )
        layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU())
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 1))
