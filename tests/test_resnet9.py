"""ResNet-9: its shapes, and its answer in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer import ConfigError
from trainer.components.models import build_model
from trainer.components.resnet9 import ResNet9, WhitenedPatches, cosine_basis
from trainer.config.model_sections import ModelConfig


def images(channels: int, side: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, channels, side, side, generator=draw)


FAST = {"whiten": True, "activation": "gelu", "identity_init": True}


@pytest.mark.parametrize("options", [{}, FAST])
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (3, 16)])
def test_it_takes_small_images_of_any_size(
    channels: int, side: int, options: dict[str, object]
) -> None:
    section = ModelConfig(name="resnet9", args={"width": 4, **options})
    model = build_model(section, seed=0, num_classes=7, in_channels=channels)
    assert isinstance(model, ResNet9)
    assert model(images(channels, side)).shape == (4, 7)


@pytest.mark.parametrize("whiten", [False, True])
def test_it_has_nine_layers_with_weights(whiten: bool) -> None:
    layers = [p for p in ResNet9(10, whiten=whiten).parameters() if p.dim() > 1]
    assert len(layers) == 9


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_cosine_basis_is_orthonormal_and_begins_with_the_mean(size: int) -> None:
    basis = cosine_basis(size)
    unit = torch.eye(size, dtype=torch.float64)
    assert torch.allclose(basis @ basis.T, unit, atol=1e-15)
    assert torch.allclose(basis[0], torch.full((size,), size**-0.5).double())


def smooth_images() -> Tensor:
    """Images whose neighbours are alike, and whose channels are: as photographs are."""
    noise = images(4, 40)
    shared, own = noise[:, :1], noise[:, 1:]
    return nn.functional.avg_pool2d(shared + 0.5 * own, 5, stride=1)


def correlations(channels: Tensor) -> Tensor:
    """`(N, C, H, W)` → the correlations of each two channels, `(C (C - 1) / 2,)`, without signs."""
    matrix = torch.corrcoef(channels.transpose(0, 1).flatten(1)).abs()
    above = torch.triu(torch.ones_like(matrix, dtype=torch.bool), diagonal=1)
    return matrix[above]


def test_patches_are_whitened_and_nothing_of_them_is_lost() -> None:
    batch = smooth_images()
    layer = WhitenedPatches(3)
    whitened = layer(batch)
    patches = nn.functional.unfold(batch, 3, padding=1).view(4, 27, 36, 36)
    coefficients = nn.functional.conv2d(batch, layer.basis, padding=1)
    assert torch.allclose(coefficients.norm(dim=1), patches.norm(dim=1), atol=1e-5)
    variance = coefficients.var((0, 2, 3), correction=0)
    expected = variance / (variance + 0.01)
    assert torch.allclose(whitened.var((0, 2, 3), correction=0), expected, atol=1e-4)
    assert correlations(patches).mean() > 0.4
    assert correlations(whitened).mean() < 0.1


def test_a_convolution_begins_with_the_identity() -> None:
    model = ResNet9(5, width=4, identity_init=True)
    convolutions = [m for m in model.features.modules() if isinstance(m, nn.Conv2d)]
    for convolution in convolutions:
        inputs = torch.randn(2, convolution.in_channels, 6, 6)
        outputs = convolution(inputs)[:, : convolution.in_channels]
        assert torch.allclose(outputs, inputs, atol=1e-6)


def test_in_evaluation_alone_it_answers_with_the_mean_for_both_images() -> None:
    torch.manual_seed(0)
    model = ResNet9(5, width=4, flip_in_evaluation=True)
    plain = ResNet9(5, width=4)
    plain.load_state_dict(model.state_dict())
    batch = images(3, 32)
    assert torch.equal(model(batch), plain(batch))
    model.eval()
    plain.load_state_dict(model.state_dict())
    plain.eval()
    mean = (plain(batch) + plain(batch.flip(3))) / 2
    assert torch.equal(model(batch), mean)
    assert torch.allclose(model(batch), model(batch.flip(3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width must be 1 or more"),
        ({"activation": "swish"}, "activation must be relu or gelu, not swish"),
    ],
)
def test_what_it_cannot_be_is_refused(
    arguments: dict[str, object], message: str
) -> None:
    section = ModelConfig(name="resnet9", args=arguments)
    with pytest.raises(ConfigError, match=message):
        build_model(section, seed=0, num_classes=3, in_channels=3)
