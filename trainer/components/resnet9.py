"""A small residual network for small images, as recipes for fast training on CIFAR-10 use it."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.components.small_models import conv_block

LOGIT_SCALE = 0.125


class Residual(nn.Module):
    """Two convolutions of the same width, added to what they were given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_block(width, width), *conv_block(width, width)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = inputs + self.layers(inputs)
        return output


class ResNet9(nn.Module):
    """Nine layers with BatchNorm, `(N, in_channels, H, W)` → `(N, num_classes)`, for images of 16 × 16 pixels or more.

    After Page ("How to Train Your ResNet", 2018–2019): four widths, doubled where the image is halved, two residual
    blocks, a maximum over the last map, and logits of an eighth of the last layer's output.

    Args:
        width: channels of the first layer; the last has eight times as many.
        flip_in_evaluation: answer in evaluation with the mean for an image and for its mirror image, at twice the time.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: int = 64,
        flip_in_evaluation: bool = False,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be 1 or more, not {width}")
        self.flip_in_evaluation = flip_in_evaluation
        self.features = nn.Sequential(
            *conv_block(in_channels, width),
            *_halving(width, 2 * width),
            Residual(2 * width),
            *_halving(2 * width, 4 * width),
            *_halving(4 * width, 8 * width),
            Residual(8 * width),
        )
        self.head = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        logits = self._logits(images)
        if self.flip_in_evaluation and not self.training:
            logits = (logits + self._logits(images.flip(-1))) / 2
        return logits

    def _logits(self, images: Tensor) -> Tensor:
        # Not AdaptiveMaxPool2d, whose gradient is not deterministic on CUDA.
        logits: Tensor = self.head(self.features(images).amax((2, 3)))
        return logits * LOGIT_SCALE


def _halving(inputs: int, outputs: int) -> list[nn.Module]:
    """A convolution, and half the image's size. The maximum comes before BatchNorm: it is a quarter of its work."""
    convolution, norm, activation = conv_block(inputs, outputs)
    return [convolution, nn.MaxPool2d(2), norm, activation]
