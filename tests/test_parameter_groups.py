"""Parameter groups by pattern: against torch's own optimizers with the same groups, bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net, fitted, state
from trainer import ConfigError
from trainer.components.freezing import Freezing
from trainer.components.optimizer import (
    build_optimizer,
    load_named_state,
    named_state,
    set_learning_rate,
)
from trainer.components.parameter_groups import describe_groups
from trainer.config.model_sections import ModelConfig, OptimizerConfig
from trainer.config.schema import Config
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.sweep.check import check
from trainer.sweep.description import read_sweep


class Net(nn.Module):
    """`token` is one that the model would spare weight decay, as a vision transformer does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(1, 4))
        self.body = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.body(x + self.token)).tanh())
        return result


def section(name: str = "sgd", **keys: Any) -> OptimizerConfig:
    config = Config.from_dict({"optimizer": {"name": name, "lr": 0.1, **keys}})
    return config.optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        set_learning_rate(optimizer, 0.5**step)
        model(torch.randn(5, 4, generator=draw)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(model: nn.Module) -> dict[str, list[Any]]:
    return {name: p.flatten().tolist() for name, p in model.named_parameters()}


CASES: list[tuple[dict[str, Any], Any, dict[str, dict[str, Any]]]] = [
    # The issue's own two lines: what both match has the options of both.
    (
        {
            "name": "sgd",
            "momentum": 0.9,
            "weight_decay": 0.1,
            "groups": [
                {"match": "norm|bias", "weight_decay": 0},
                {"match": "head", "lr": 0.01},
            ],
        },
        torch.optim.SGD,
        {
            "token|body.weight": {},
            "norm|body.bias": {"weight_decay": 0},
            "head.weight": {"lr": 0.01},
            "head.bias": {"lr": 0.01, "weight_decay": 0},
        },
    ),
    # A later group's options over an earlier one's, and all of them over the other keys.
    (
        {
            "name": "adamw",
            "weight_decay": 0.2,
            "decay_norm_and_bias": False,
            "backbone_lr": 0.05,
            "groups": [
                {"match": "", "betas": [0.8, 0.9], "weight_decay": 0.3},
                {"match": r"^norm\.", "betas": [0.5, 0.6], "lr": 0.02},
                {"match": "bias$", "weight_decay": 0.0, "eps": 0.001},
            ],
        },
        torch.optim.AdamW,
        {
            "token|body.weight": {"lr": 0.05, "weight_decay": 0.3, "betas": (0.8, 0.9)},
            "body.bias": {
                "lr": 0.05,
                "weight_decay": 0,
                "betas": (0.8, 0.9),
                "eps": 0.001,
            },
            "norm.weight": {"lr": 0.02, "weight_decay": 0.3, "betas": (0.5, 0.6)},
            "norm.bias": {
                "lr": 0.02,
                "weight_decay": 0,
                "betas": (0.5, 0.6),
                "eps": 0.001,
            },
            "head.weight": {"weight_decay": 0.3, "betas": (0.8, 0.9)},
            "head.bias": {"weight_decay": 0, "betas": (0.8, 0.9), "eps": 0.001},
        },
    ),
]


@pytest.mark.parametrize(("keys", "kind", "groups"), CASES)
def test_groups_are_torchs_own(
    keys: dict[str, Any], kind: Any, groups: dict[str, dict[str, Any]]
) -> None:
    model, other = Net(), Net()
    optimizer = build_optimizer(section(**keys), model)
    plain_groups = []
    for pattern, options in groups.items():
        own = [p for name, p in other.named_parameters() if re.match(pattern, name)]
        plain_groups.append({"params": own, **options})
    assert sum(len(g["params"]) for g in plain_groups) == 7
    arguments = {k: keys[k] for k in ("momentum", "weight_decay") if k in keys}
    plain = kind(plain_groups, lr=0.1, **arguments)
    for group in plain.param_groups:
        group["initial_lr"] = group["lr"]
    train(model, optimizer, range(3))
    train(other, plain, range(3))
    assert bits(model) == bits(other)
    # Saved and restored, it goes on with the config's options, not with those of the file.
    saved = named_state(optimizer, model)
    assert not any(
        name.partition(".")[0] in ("betas", "eps", "from_config") for name in saved[1]
    )
    copy = Net()
    copy.load_state_dict(model.state_dict())
    restored = build_optimizer(section(**keys), copy)
    load_named_state(restored, copy, *saved)
    train(copy, restored, range(3, 5))
    train(other, plain, range(3, 5))
    assert bits(copy) == bits(other)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"groups": [{"match": "haed", "lr": 1}]},
            'optimizer.groups[0].match: "haed" is found in the name of no parameter; they are called token, '
            'body.weight, body.bias, norm.weight and 3 more; did you mean "head"?',
        ),
        (
            {"groups": [{"match": "head", "momentun": 0.5}]},
            'optimizer.groups[0].momentun: "sgd" has no such option of a group; did you mean "momentum"?; it has lr',
        ),
        (
            {"groups": [{"match": "", "lr": 1}, {"match": "head", "fused": True}]},
            "optimizer.groups[1].fused: chooses how all parameters are updated; set optimizer.fused",
        ),
        (
            {"groups": [{"match": "head", "momentum": -1}]},
            "optimizer.groups: {momentum: -1}: SGD refused its arguments",
        ),
        (
            {"groups": [{"match": "head", "nesterov": True}]},
            "optimizer.groups: {nesterov: true}: SGD refused its arguments",
        ),
        ({"groups": [{"lr": 1}]}, "optimizer.groups[0].match: null is not text"),
        ({"groups": [{"match": "(", "lr": 1}]}, 'optimizer.groups[0].match: "(" is no'),
        ({"groups": [{"match": "a"}]}, "optimizer.groups[0]: gives no option beside"),
        (
            {"groups": [{"match": "a", "lr": -1}]},
            "optimizer.groups[0].lr: -1 is not a number, 0 or more",
        ),
        ({"groups": {"match": "a"}}, "optimizer.groups: {match: a} is not a list of"),
        (
            {"name": "torch.optim.Rprop", "no_weight_decay": "honour"},
            'optimizer.no_weight_decay: "torch.optim.Rprop" has no weight_decay',
        ),
    ],
)
def test_a_mistake_in_a_group_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(section(**keys), Net())
    assert str(caught.value).startswith(message)


def decayed(**keys: Any) -> set[str]:
    model = Net()
    optimizer = build_optimizer(section(weight_decay=0.5, **keys), model)
    names = {id(p): name for name, p in model.named_parameters()}
    with_decay = [g["params"] for g in optimizer.param_groups if g["weight_decay"]]
    return {names[id(p)] for group in with_decay for p in group}


def test_what_a_model_asks_to_spare() -> None:
    everything = set(dict(Net().named_parameters()))
    weights = {"body.weight", "head.weight"}
    assert decayed() == decayed(no_weight_decay="ignore") == everything
    assert decayed(no_weight_decay="honour") == everything - {"token"}
    assert decayed(decay_norm_and_bias=False) == weights
    spared_by_shape = decayed(decay_norm_and_bias=False, no_weight_decay="ignore")
    assert spared_by_shape == weights | {"token"}
    groups = [{"match": "token", "weight_decay": 0.1}]
    assert decayed(no_weight_decay="honour", groups=groups) == everything


def lines(**keys: Any) -> list[str]:
    model = Net()
    model.body.requires_grad_(False)
    options = section(weight_decay=0.5, **keys)
    return list(
        describe_groups(options, build_optimizer(options, model), ModelAndLoss(model))
    )


def test_the_header_shows_groups() -> None:
    (note,) = lines()
    assert note == (
        "weight decay also where the model's no_weight_decay() asks for none: token; optimizer.no_weight_decay=honour "
        "spares them"
    )
    groups = [
        {"match": "norm|bias", "weight_decay": 0},
        {"match": "head", "lr": 0.01, "momentum": 0.9},
        {"match": "body", "lr": 3.0},
    ]
    assert lines(groups=groups, no_weight_decay="honour") == [
        "group of 12 parameters · lr 0.01 · weight_decay 0.5 · momentum 0.9",
        "group of 12 parameters · lr 0.1 · weight_decay 0 · momentum 0",
        "group of 3 parameters · lr 0.01 · weight_decay 0 · momentum 0.9",
        "optimizer.groups[2] has no effect: all its parameters are frozen",
        "no weight decay, as the model's no_weight_decay() asks: token",
    ]


def test_losses_and_parts_that_thaw_later_have_groups_too() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2))

    model, loss = Net(), Loss()
    frozen = ModelConfig(
        head="head", freeze="backbone", unfreeze={"2": ["body"], "3": ["token"]}
    )
    freezing = Freezing(model, frozen)
    groups = [
        {"match": "^loss/", "lr": 0.5},
        {"match": "^body", "lr": 0.25},
        {"match": "bias", "weight_decay": 0.125},
        {"match": "norm", "lr": 1.0},
    ]
    optimizer = build_optimizer(section(groups=groups), model, loss=loss)
    freezing.apply(0)
    assert not model.body.weight.requires_grad
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    # What is never trained, the norm here, has no group.
    assert found == {
        id(loss.bias): (0.5, 0.125),
        id(model.body.weight): (0.25, 0),
        id(model.body.bias): (0.25, 0.125),
        id(model.token): (0.1, 0),
        id(model.head.weight): (0.1, 0),
        id(model.head.bias): (0.1, 0.125),
    }


GROUPS = [
    {"match": "bias|1.weight", "weight_decay": 0.0},
    {"match": r"^4\.", "lr": 0.02, "betas": [0.8, 0.95]},
]


def trained(directory: Path, **changes: Any) -> tuple[dict[str, Tensor], list[Any]]:
    settings = config(
        directory,
        **{
            "run__resume": "auto",
            "run__reproducibility": "bitwise",
            "batch__micro_size": 7,
            "optimizer__momentum": None,
            "optimizer__name": "adamw",
            "optimizer__groups": GROUPS,
            **changes,
        },
    )
    trainer = fitted(settings, conv_net(), train_data=Images(86), val_data=Images(20))
    rows = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [
        {name: value for name, value in json.loads(row).items() if name[:2] == "lr"}
        for row in rows
    ]
    return state(trainer), rates


def test_a_sweep_varies_an_option_of_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    base = tmp_path / "a.yaml"
    base.write_text("base: digits\noptimizer: {groups: [{match: bias, lr: 0.5}]}")
    text = (
        "program: train.py\nmethod: grid\nmetric: {name: val/accuracy}\n"
        f"command: ['${{program}}', {base}, '~optimizer.weight_decay', '${{args_no_hyphens}}']\n"
        "parameters:\n  optimizer.groups.0."
    )
    file = tmp_path / "sweep.yaml"
    file.write_text(f"{text}lr: {{values: [0.1, 0.2]}}\n")
    assert "weight_decay" not in check(read_sweep(file), []).optimizer.args
    file.write_text(f"{text}momentun: {{values: [0.1]}}\n")
    with pytest.raises(
        ConfigError, match=r"\[0\].momentun: \"sgd\" has no such option"
    ):
        check(read_sweep(file), [])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_bits_on_any_processes_and_after_a_stop(tmp_path: Path) -> None:
    ((reference, rates),) = on_ranks(1, trained, tmp_path / "1")
    (plain, _), *_ = on_ranks(1, trained, tmp_path / "plain", optimizer__groups=[])
    assert not same(reference, plain)
    assert rates[0].keys() == {"lr", "lr/0", "lr/1", "lr/2", "lr/3"}
    assert sorted(set(rates[0].values())) == [0.02, 0.1]
    on_ranks(2, trained, tmp_path / "cut", train__max_steps=3)
    for result, _ in on_ranks(3, trained, tmp_path / "cut"):
        assert same(result, reference)
    changed = [{**GROUPS[0], "weight_decay": 0.1}, GROUPS[1]]
    with pytest.raises(AssertionError, match=r"optimizer\.groups was "):
        on_ranks(1, trained, tmp_path / "1", optimizer__groups=changed)
