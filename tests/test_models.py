"""Models by name and by path, their initial weights a function of the seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainer.components.models import build_model, count_parameters, input_channels
from trainer.config.model_sections import ModelConfig
from trainer.errors import ConfigError


def model(name: str, seed: int = 0, channels: int | None = 3, **args: Any) -> nn.Module:
    return build_model(
        ModelConfig(name=name, args=args),
        seed=seed,
        num_classes=7,
        in_channels=channels,
    )


class Net(nn.Linear):
    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__(width, num_classes)

    @classmethod
    def of_width(cls, width: int, **more: int) -> Net:
        assert more.keys() == {"num_classes", "in_channels"}
        return cls(more["num_classes"], width)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("small_cnn", (2, 3, 8, 8)),
        ("resnet18", (2, 3, 32, 32)),
        (f"{__name__}.Net", (2, 4)),
    ],
)
def test_names_and_paths(name: str, shape: tuple[int, ...]) -> None:
    net = model(name)
    assert net(torch.rand(shape)).shape == (2, 7)
    assert count_parameters(net)[0] == sum(p.numel() for p in net.parameters())


class Bare(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_class_without_a_constructor_of_its_own() -> None:
    assert isinstance(model("tests.test_models.Bare"), Bare)


def test_data_gives_channels_and_the_config_overrules() -> None:
    assert model("small_cnn", channels=input_channels(torch.rand(5, 2, 8, 8)))(
        torch.rand(1, 2, 8, 8)
    ).shape == (1, 7)
    assert model("small_cnn", in_channels=5)(torch.rand(1, 5, 8, 8)).shape == (1, 7)
    assert input_channels(torch.rand(5, 2)) is None
    assert model(f"{__name__}.Net", width=6)(torch.rand(1, 6)).shape == (1, 7)
    assert model(f"{__name__}.Net.of_width", width=6)(torch.rand(1, 6)).shape == (1, 7)


def test_initial_weights_are_the_seeds() -> None:
    torch.manual_seed(1)
    one, state = model("small_cnn", seed=3).state_dict(), torch.get_rng_state()
    torch.manual_seed(1)
    # The caller's own draws go on as they were.
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(
        torch.equal(one[k], v)
        for k, v in model("small_cnn", seed=3).state_dict().items()
    )
    assert not torch.equal(
        one["0.weight"], model("small_cnn", seed=4).state_dict()["0.weight"]
    )


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "resnet81",
            {},
            'model.name: "resnet81" is neither small_cnn, a torchvision model nor an import path',
        ),
        (
            "small_cnn",
            {"widht": 3},
            'model.widht: small_cnn has no such argument; did you mean "width"?',
        ),
        ("math.sqrt", {}, "model"),
        (f"{__name__}.Net.of_widht", {}, 'has no "of_widht"; did you mean "of_width"?'),
        (f"{__name__}.Nte.of_width", {}, f'cannot import "{__name__}.Nte"'),
        ("no_such_package.Net", {}, 'cannot import "no_such_package"'),
    ],
)
def test_mistakes(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model(name, **args)
    assert message in str(caught.value)


def test_classes_that_the_data_do_not_name() -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(
            ModelConfig(name=f"{__name__}.Net"),
            seed=0,
            num_classes=None,
            in_channels=None,
        )
    assert caught.value.key == "model.num_classes"
    assert "set it to the number of outputs" in caught.value.message
