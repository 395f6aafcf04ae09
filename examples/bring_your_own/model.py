"""The project's own model."""

from __future__ import annotations

from torch import nn


def dilated_net(in_channels: int, width: int = 16) -> nn.Sequential:
    """Images `(N, in_channels, H, W)` → a logit for each pixel, `(N, 1, H, W)`.

    Any function or class that gives a `torch.nn.Module`. `in_channels` is supplied from the data because it is asked
    for by that name; `num_classes` would be as well.
    """
    layers: list[nn.Module] = []
    for inputs, dilation in ((in_channels, 1), (width, 2), (width, 4), (width, 8)):
        layers += [
            nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 1))
