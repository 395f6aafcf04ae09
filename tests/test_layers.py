"""The layers that `layer_decay` counts, as a model says or is nested, and what a model spares weight decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from trainer.components.heads import find_head
from trainer.components.layers import layers_of
from trainer.components.learning_rates import base_rates, describe_layers
from trainer.components.optimizer import build_optimizer
from trainer.config.model_sections import OptimizerConfig
from trainer.errors import ConfigError


class Block(nn.Module):
    """A residual block; the inside is a sequence of different parts, which are not layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.norm = nn.GroupNorm(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


class Stage(nn.Module):
    """A downsampling and blocks, nested as in ConvNeXt."""

    def __init__(self, inputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.downsample = nn.Sequential(
            nn.GroupNorm(1, inputs), nn.Conv2d(inputs, width, 2, stride=2)
        )
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Nested(nn.Module):
    """Depths 2, 2, 6, 2, as the smallest ConvNeXt: 12 blocks between stem and head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 2), nn.GroupNorm(1, 4))
        self.stages = nn.Sequential(*(Stage(4, 4, depth) for depth in (2, 2, 6, 2)))
        self.scale = nn.Parameter(torch.ones(1, 4))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)


class Matched(Nested):
    """The same with what timm's models say of themselves."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        assert not coarse
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^scale", (99999,)),
            ],
        }

    def no_weight_decay(self) -> set[str]:
        return {"scale"}

    def no_weight_decay_keywords(self) -> set[str]:
        return {"downsample.1.w"}


@pytest.mark.parametrize("kind", [Nested, Matched])
def test_a_block_is_a_layer_however_deep_it_stands(kind: type[Nested]) -> None:
    model = kind()
    layers = layers_of(model, find_head(model, None))
    assert set(layers.values()) == set(range(14))
    expected = {
        "stem.0.weight": 0,
        "stem.1.weight": 0,
        "stages.0.downsample.1.weight": 1,
        "stages.0.blocks.0.conv.0.weight": 1,
        "stages.0.blocks.1.norm.weight": 2,
        "stages.1.downsample.0.bias": 3,
        "stages.3.blocks.1.conv.0.bias": 12,
        "head.weight": 13,
    }
    assert {name: layers[name] for name in expected} == expected
    section = OptimizerConfig(lr=1.0, layer_decay=0.5)
    rates = base_rates(section, model, None)
    assert rates["stem.0.weight"] == 0.5**13
    assert describe_layers(section, model, None) == "14 layers, lr 0.000122 to 1"


def test_what_no_pattern_matches_is_of_the_last_layer_and_of_the_backbone() -> None:
    section = OptimizerConfig(lr=1.0, backbone_lr=0.1, layer_decay=0.5)
    rates = base_rates(section, Matched(), None)
    assert (rates["head.weight"], rates["norm.weight"]) == (1.0, 0.1)
    # 99999: with the layer before.
    assert rates["scale"] == rates["stages.3.blocks.1.norm.bias"] == 0.05


def test_a_matcher_that_fails_is_named() -> None:
    model = Matched()
    model.group_matcher = lambda coarse: {"blocks": "("}  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"optimizer.layer_decay: the model's group_"):
        base_rates(OptimizerConfig(layer_decay=0.5), model, None)


@pytest.mark.parametrize(
    ("name", "layers", "places"),
    [
        # Stages that are Sequentials of their own class: 1, 3, 6, 6 blocks.
        (
            "regnet_y_400mf",
            18,
            {"stem.0.weight": 0, "trunk_output.block3.block3-1.": 6},
        ),
        # 58 dense layers, three transitions.
        ("densenet121", 63, {"features.denseblock1.denselayer2.": 2}),
        # 2, 2, 5, 2 blocks whose inside is a sequence of different parts; a linear layer before the head.
        ("maxvit_t", 15, {"blocks.0.layers.1.": 3, "classifier.3.": 13}),
        # As before: members of plain Sequentials.
        ("resnet18", 10, {"layer1.0.conv2.": 1, "layer4.1.": 8, "bn1.": 0}),
        ("convnext_tiny", 23, {"features.1.2.": 3, "features.2.1.": 4}),
        ("swin_t", 17, {"features.1.1.": 2, "features.2.": 3, "norm.": 15}),
        ("efficientnet_b0", 19, {"features.2.1.": 3, "features.8.": 17}),
        ("vit_b_16", 14, {"encoder.ln.": 12, "encoder.pos_embedding": 0}),
    ],
)
def test_torchvisions_models(name: str, layers: int, places: dict[str, int]) -> None:
    kind = "cpu" if name.startswith("regnet") else "meta"
    with torch.device(kind):
        model = models.get_model(name)
    found = layers_of(model, find_head(model, None))
    assert set(found.values()) == set(range(layers))
    for prefix, layer in places.items():
        numbers = {found[key] for key in found if key.startswith(prefix)}
        assert numbers == {layer}, prefix


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "convnext_atto", "vit_tiny_patch16_224", "efficientnet_b0"),
        *("swin_tiny_patch4_window7_224", "regnety_002", "mobilenetv3_small_050"),
    ],
)
def test_timms_models_have_timms_rates(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        model = timm.create_model(name)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    expected = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for parameter in group["params"]:
            expected[names[id(parameter)]] = group["lr_scale"]
    section = OptimizerConfig(lr=1.0, layer_decay=0.5)
    assert base_rates(section, model, None) == expected


@pytest.mark.parametrize("spared", [True, False])
def test_a_models_own_list_is_spared_weight_decay(spared: bool) -> None:
    model = Matched()
    section = OptimizerConfig(
        decay_norm_and_bias=not spared, args={"weight_decay": 0.1}
    )
    optimizer = build_optimizer(section, model)
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    spare = 0.0 if spared else 0.1
    own = dict(model.named_parameters())
    assert decay[id(own["scale"])] == spare
    assert decay[id(own["stages.1.downsample.1.weight"])] == spare
    assert decay[id(own["stem.0.weight"])] == 0.1
