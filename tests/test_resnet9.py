"""ResNet-9: its shapes, and its answer in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer import ConfigError
from trainer.components.models import build_model
from trainer.components.resnet9 import ResNet9
from trainer.config.model_sections import ModelConfig


def images(channels: int, side: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, channels, side, side, generator=draw)


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (3, 16)])
def test_it_takes_small_images_of_any_size(channels: int, side: int) -> None:
    section = ModelConfig(name="resnet9", args={"width": 4})
    model = build_model(section, seed=0, num_classes=7, in_channels=channels)
    assert isinstance(model, ResNet9)
    assert model(images(channels, side)).shape == (4, 7)


def test_it_has_nine_layers_with_weights() -> None:
    layers = [p for p in ResNet9(10).parameters() if p.dim() > 1]
    assert len(layers) == 9


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


def test_a_width_of_nothing_is_refused() -> None:
    section = ModelConfig(name="resnet9", args={"width": 0})
    with pytest.raises(ConfigError, match="width must be 1 or more"):
        build_model(section, seed=0, num_classes=3, in_channels=3)
