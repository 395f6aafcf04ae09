"""A small residual network for small images, as recipes for fast training on CIFAR-10 use it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.components.small_models import conv_block

LOGIT_SCALE = 0.125
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}
PATCH = 3
# Added to each coefficient's variance: the finest ones of a photograph are mostly noise, which it keeps small.
WHITENING_EPS = 0.01


class Residual(nn.Module):
    """Two convolutions of the same width, added to what they were given."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_block(width, width, activation=activation),
            *conv_block(width, width, activation=activation),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = inputs + self.layers(inputs)
        return output


class WhitenedPatches(nn.Module):
    """Each pixel's 3 × 3 patch as uncorrelated numbers of variance 1, `(N, C, H, W)` → `(N, 9 C, H, W)`.

    Recipes since Page (2019) take the principal components of patches of the training images. Those of photographs are
    close to the cosine basis, over the pixels as over red, green and blue (Ahmed, Natarajan and Rao, 1974). The basis
    is fixed, so that nothing is measured before training, and BatchNorm without weights makes each variance 1.
    """

    basis: Tensor

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        pixels = cosine_basis(PATCH)
        filters = torch.einsum(
            "ac,by,dx->abdcyx", cosine_basis(in_channels), pixels, pixels
        )
        self.register_buffer("basis", filters.flatten(0, 2).float())
        self.norm = nn.BatchNorm2d(len(self.basis), eps=WHITENING_EPS, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        coefficients = nn.functional.conv2d(images, self.basis, padding=PATCH // 2)
        output: Tensor = self.norm(coefficients)
        return output


class ResNet9(nn.Module):
    """Nine layers with BatchNorm, `(N, in_channels, H, W)` → `(N, num_classes)`, for images of 16 × 16 pixels or more.

    After Page ("How to Train Your ResNet", 2018–2019): four widths, doubled where the image is halved, two residual
    blocks, a maximum over the last map, and logits of an eighth of the last layer's output.

    Args:
        width: channels of the first layer; the last has eight times as many.
        flip_in_evaluation: answer in evaluation with the mean for an image and for its mirror image, at twice the time.
        whiten: the first layer takes whitened 3 × 3 patches (`WhitenedPatches`) instead of pixels.
        activation: `relu` or `gelu`.
        identity_init: each convolution begins by handing on its inputs, as its first outputs (Jordan, 2024).
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: int = 64,
        *,
        flip_in_evaluation: bool = False,
        whiten: bool = False,
        activation: str = "relu",
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be 1 or more, not {width}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be relu or gelu, not {activation}")
        kind = ACTIVATIONS[activation]
        self.flip_in_evaluation = flip_in_evaluation
        self.features = nn.Sequential(
            *_first_layer(in_channels, width, kind, whiten=whiten),
            *_halving(width, 2 * width, kind),
            Residual(2 * width, kind),
            *_halving(2 * width, 4 * width, kind),
            *_halving(4 * width, 8 * width, kind),
            Residual(8 * width, kind),
        )
        self.head = nn.Linear(8 * width, num_classes, bias=False)
        if identity_init:
            _begin_with_identity(self)

    def forward(self, images: Tensor) -> Tensor:
        logits = self._logits(images)
        if self.flip_in_evaluation and not self.training:
            logits = (logits + self._logits(images.flip(-1))) / 2
        return logits

    def _logits(self, images: Tensor) -> Tensor:
        # Not AdaptiveMaxPool2d, whose gradient is not deterministic on CUDA.
        logits: Tensor = self.head(self.features(images).amax((2, 3)))
        return logits * LOGIT_SCALE


def cosine_basis(size: int) -> Tensor:
    """The orthonormal basis of the discrete cosine transform (DCT-II) in float64, `(size, size)`, a vector a row."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * (math.pi / size)
    frequency = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(frequency[:, None] * position) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def _first_layer(
    in_channels: int, width: int, activation: type[nn.Module], *, whiten: bool
) -> list[nn.Module]:
    if not whiten:
        return conv_block(in_channels, width, activation=activation)
    # A convolution of one pixel is enough: each pixel's patch is among its channels already.
    patches = WhitenedPatches(in_channels)
    mix = nn.Conv2d(len(patches.basis), width, 1, bias=False)
    return [patches, mix, activation()]


def _halving(inputs: int, outputs: int, activation: type[nn.Module]) -> list[nn.Module]:
    """A convolution, and half the image's size. The maximum comes before BatchNorm: it is a quarter of its work."""
    convolution, norm, active = conv_block(inputs, outputs, activation=activation)
    return [convolution, nn.MaxPool2d(2), norm, active]


def _begin_with_identity(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (PATCH, PATCH):
            inputs = module.in_channels
            nn.init.dirac_(module.weight[:inputs])
