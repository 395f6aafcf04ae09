"""ResNet-18 and ResNet-50 for the GPU report, so that it needs no torchvision: the machine may not have it.

He et al., 2015, with the stride in the 3 × 3 convolution of a bottleneck, as in torchvision: the parameters and buffers
are torchvision's, in the same order, and so is the output.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

STAGES = 4
WIDTH = 64  # channels of the first stage


class Residual(nn.Module):
    """`relu(body(x) + shortcut(x))`."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` → `(N, C', H / stride, W / stride)`."""
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


def resnet18(num_classes: int = 1000, width: int = WIDTH) -> nn.Module:
    """`(N, 3, H, W)` → `(N, num_classes)`. A smaller `width` is for rehearsals."""
    return _resnet([2, 2, 2, 2], width, expansion=1, num_classes=num_classes)


def resnet50(num_classes: int = 1000, width: int = WIDTH) -> nn.Module:
    """`(N, 3, H, W)` → `(N, num_classes)`. A smaller `width` is for rehearsals."""
    return _resnet([3, 4, 6, 3], width, expansion=4, num_classes=num_classes)


def _resnet(
    blocks: list[int], width: int, *, expansion: int, num_classes: int
) -> nn.Module:
    block = _basic if expansion == 1 else partial(_bottleneck, expansion=expansion)
    layers: list[nn.Module] = [
        *_convolution(3, width, 7, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    channels = width
    for stage in range(STAGES):
        for index in range(blocks[stage]):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(block(channels, width << stage, stride=stride))
            channels = (width << stage) * expansion
    layers += [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, num_classes),
    ]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _basic(channels: int, width: int, stride: int) -> Residual:
    body = nn.Sequential(
        *_convolution(channels, width, 3, stride),
        nn.ReLU(inplace=True),
        *_convolution(width, width, 3),
    )
    return Residual(body, _shortcut(channels, width, stride))


def _bottleneck(channels: int, width: int, stride: int, expansion: int) -> Residual:
    body = nn.Sequential(
        *_convolution(channels, width, 1),
        nn.ReLU(inplace=True),
        *_convolution(width, width, 3, stride),
        nn.ReLU(inplace=True),
        *_convolution(width, width * expansion, 1),
    )
    return Residual(body, _shortcut(channels, width * expansion, stride))


def _shortcut(channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out_channels:
        return nn.Identity()
    return nn.Sequential(*_convolution(channels, out_channels, 1, stride))


def _convolution(
    channels: int, out_channels: int, kernel: int, stride: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(
        channels, out_channels, kernel, stride, padding=kernel // 2, bias=False
    )
    return [convolution, nn.BatchNorm2d(out_channels)]
