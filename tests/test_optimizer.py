"""Groups and base rates; and a state that goes through safetensors and JSON and continues bit for bit."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from trainer.components.optimizer import (
    _can_be_fused,
    build_optimizer,
    load_named_state,
    named_state,
    set_learning_rate,
)
from trainer.config.model_sections import OptimizerConfig
from trainer.errors import ConfigError, LockstepError


class Net(nn.Module):
    """A little of everything; `spare` never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(()))
        self.spare = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return self.head(self.norm(self.bn(self.conv(x))).mean((2, 3))) * self.scale


def net(dtype=torch.float32, memory_format=torch.contiguous_format) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype=dtype).to(memory_format=memory_format)


def optimizer_of(model: nn.Module, name: str, **arguments) -> torch.optim.Optimizer:
    keys = {
        k: arguments.pop(k) for k in ("lr", "decay_norm_and_bias") if k in arguments
    }
    return build_optimizer(OptimizerConfig(name=name, args=arguments, **keys), model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for k in steps:
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(2, 3, 5, 5, generator=generator).to(model.scale.dtype)
        set_learning_rate(optimizer, 0.9**k)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def through_files(tensors, numbers):
    return safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(
        json.dumps(numbers)
    )


class Custom(torch.optim.Optimizer):
    """Keeps a Python float, an int tensor, a flag and a None for each parameter, and a count in its group."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "count": 0, "average": None})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] = {
                        "ema": 0.1,
                        "signs": torch.zeros_like(p, dtype=torch.int64),
                        "on": True,
                    }
                    self.state[p] |= {"nothing": None, "kind": "plain"}
                state = self.state[p]
                state["ema"] = 0.9 * state["ema"] + 0.1 * p.grad.norm().item()
                state["signs"] += p.grad.sign().to(torch.int64)
                group["average"] = torch.as_tensor(
                    state["ema"] / 3, dtype=torch.float64
                )
                factor = group["lr"] / (
                    state["ema"] + group["count"] + group["average"].item()
                )
                p.sub_(p.grad + state["signs"] * 1e-3, alpha=factor)


ROUND_TRIPS = {
    "sgd": {},
    "sgd momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "adam": {"lr": 0.01},
    "adam fused": {"lr": 0.01, "fused": True},
    "adamw amsgrad": {
        "lr": 0.01,
        "amsgrad": True,
        "weight_decay": 0.1,
        "decay_norm_and_bias": False,
    },
    "torch.optim.RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "torch.optim.NAdam": {"lr": 0.01},
    "torch.optim.ASGD": {"lr": 0.01},
    "torch.optim.Adafactor": {"lr": 0.01},
    f"{__name__}.Custom": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_a_restored_optimizer_continues_bit_for_bit(case, dtype):
    check_round_trip(case.split()[0], ROUND_TRIPS[case], dtype, torch.contiguous_format)


@pytest.mark.parametrize("case", ["sgd momentum", "adam"])
def test_so_does_one_of_a_channels_last_model(case):
    check_round_trip(
        case.split()[0], ROUND_TRIPS[case], torch.float32, torch.channels_last
    )


def check_round_trip(name, arguments, dtype, memory_format):
    for saved_after in (0, 3):
        whole = net(dtype, memory_format)
        uninterrupted = optimizer_of(whole, name, **arguments)
        train(whole, uninterrupted, range(saved_after))
        model = net(dtype, memory_format)
        model.load_state_dict(whole.state_dict())
        saved = through_files(*named_state(uninterrupted, whole))
        restored = optimizer_of(model, name, **arguments)
        load_named_state(restored, model, *saved)
        # The one thing that the schedule restores.
        set_learning_rate(uninterrupted, 1.0)
        assert_same_state(uninterrupted, restored)
        train(whole, uninterrupted, range(saved_after, 6))
        train(model, restored, range(saved_after, 6))
        assert_same_state(uninterrupted, restored)
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def assert_same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    one, other = one.state_dict(), other.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, entries in one["state"].items():
        assert entries.keys() == other["state"][index].keys()
        for key, value in entries.items():
            twin = other["state"][index][key]
            assert type(value) is type(twin)
            if isinstance(value, torch.Tensor):
                assert (value.dtype, value.device, value.stride()) == (
                    twin.dtype,
                    twin.device,
                    twin.stride(),
                ), key
                assert torch.equal(value, twin), key
                assert value.data_ptr() != twin.data_ptr() or not value.numel()
            else:
                assert value == twin


def test_names_and_shapes_of_the_saved_state():
    model = net()
    optimizer = optimizer_of(model, "adam")
    assert named_state(optimizer, model)[0] == {}
    train(model, optimizer, range(2))
    tensors, numbers = named_state(optimizer, model)
    assert tensors["exp_avg.conv.weight"].shape == model.conv.weight.shape
    assert tensors["step.scale"].shape == () and tensors["step.scale"] == 2
    assert numbers == {"parameters": [name for name, _ in model.named_parameters()]}
    assert not any(name.endswith("spare") for name in tensors)


def test_a_state_restored_in_place_does_not_follow_the_old_one():
    model = net()
    optimizer = optimizer_of(model, "adam")
    train(model, optimizer, range(1))
    other = optimizer_of(model, "adam")
    tensors, numbers = named_state(optimizer, model)
    load_named_state(other, model, tensors, numbers)
    for tensor in tensors.values():
        tensor.zero_()
    state = other.state[model.conv.weight]
    assert state["exp_avg"].abs().sum() > 0 and state["step"] == 1


def test_a_state_of_other_parameters_is_refused():
    model = net()
    optimizer = optimizer_of(model, "sgd", momentum=0.9)
    train(model, optimizer, range(1))
    tensors, numbers = named_state(optimizer, model)
    frozen = net()
    frozen.conv.weight.requires_grad_(False)
    with pytest.raises(LockstepError, match=r"has conv\.weight"):
        load_named_state(optimizer_of(frozen, "sgd"), frozen, tensors, numbers)
    grown = net()
    grown.extra = nn.Linear(2, 2)
    with pytest.raises(LockstepError, match=r"lacks extra\.bias, extra\.weight"):
        load_named_state(optimizer_of(grown, "sgd"), grown, tensors, numbers)
    with pytest.raises(LockstepError, match=r"momentum_buffer\.tail"):
        load_named_state(
            optimizer, model, {"momentum_buffer.tail": torch.ones(1)}, numbers
        )


@pytest.mark.parametrize("owner", ["parameter", "optimizer"])
def test_a_state_that_cannot_be_saved_is_named(owner):
    model = net()
    optimizer = optimizer_of(model, "sgd")
    optimizer.state[model.head.bias if owner == "parameter" else "global"] = {
        "seen": [object()]
    }
    with pytest.raises(
        LockstepError, match=r"seen\.head\.bias" if owner == "parameter" else "global"
    ):
        named_state(optimizer, model)


def test_weight_decay_spares_norms_and_biases():
    model = net()
    model.conv.bias.requires_grad_(False)
    model.other = nn.Sequential(
        nn.LayerNorm((2, 2)), nn.RMSNorm((2, 2)), nn.InstanceNorm2d(2, affine=True)
    )
    model.bias = nn.Parameter(torch.ones(1, 2))
    optimizer = optimizer_of(
        model, "sgd", lr=0.2, weight_decay=0.1, decay_norm_and_bias=False
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = (
        [names[id(p)] for p in group["params"]] for group in optimizer.param_groups
    )
    assert decayed == ["spare", "conv.weight", "head.weight"]
    assert spared == [
        "scale",
        "bias",
        "bn.weight",
        "bn.bias",
        "norm.weight",
        "norm.bias",
        "head.bias",
        "other.0.weight",
        "other.0.bias",
        "other.1.weight",
        "other.2.weight",
        "other.2.bias",
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.2, 0.2]


def test_one_group_of_what_is_trained_by_default():
    model = net()
    model.head.requires_grad_(False)
    optimizer = optimizer_of(model, "torch.optim.AdamW", betas=[0.8, 0.9])
    (group,) = optimizer.param_groups
    assert [p.shape for p in group["params"]] == [
        p.shape for p in model.parameters() if p.requires_grad
    ]
    assert isinstance(optimizer, torch.optim.AdamW) and tuple(group["betas"]) == (
        0.8,
        0.9,
    )


def test_the_learning_rate_is_the_base_rate_times_the_factor():
    optimizer = optimizer_of(net(), "sgd", lr=0.3, decay_norm_and_bias=False)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3 * 0.1] * 2


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("sgd", {"momentun": 0.9}, "optimizer.momentun"),
        ("sgd", {"params": 3}, "optimizer.params"),
        ("sgd", {"momentum": -1}, "optimizer"),
        ("sdg", {}, "optimizer.name"),
        ("torch.optim.SDG", {}, "optimizer.name"),
        (f"{__name__}.WithoutRate", {}, "optimizer.name"),
        ("builtins.list", {}, "optimizer.name"),
        ("torch.optim.LBFGS", {}, "optimizer.name"),
        (
            f"{__name__}.Custom",
            {"decay_norm_and_bias": False},
            "optimizer.decay_norm_and_bias",
        ),
    ],
)
def test_a_wrong_argument_is_named_by_its_key(name, arguments, key):
    with pytest.raises(ConfigError) as error:
        optimizer_of(net(), name, **arguments)
    assert error.value.key == key


def test_nothing_to_train_is_said():
    with pytest.raises(ConfigError, match="nothing to train"):
        optimizer_of(net().requires_grad_(False), "sgd")


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_on_the_cpu_torch_chooses_how_to_update_and_a_config_may(name):
    model = nn.Linear(2, 2)
    for arguments, expected in (
        ({}, None),
        ({"fused": True}, True),
        ({"foreach": True}, None),
    ):
        optimizer = build_optimizer(
            OptimizerConfig(name=name, lr=0.1, args=arguments), model
        )
        assert optimizer.defaults["fused"] is expected


class OnCuda(nn.Linear):
    """A layer whose weight says that it is on a GPU."""

    def __init__(self, sparse=False):
        super().__init__(2, 2, bias=False)
        self.sparse = sparse
        self.weight = type("Cuda", (nn.Parameter,), {"is_cuda": True})(self.weight.data)


def test_fused_on_cuda_where_nothing_else_is_asked():
    sgd, other = torch.optim.SGD, torch.optim.RMSprop
    assert _can_be_fused(sgd, {"momentum": 0.9}, OnCuda())
    assert not _can_be_fused(sgd, {"foreach": True}, OnCuda())
    assert not _can_be_fused(sgd, {"fused": False}, OnCuda())
    assert not _can_be_fused(other, {}, OnCuda())
    assert not _can_be_fused(sgd, {}, OnCuda(sparse=True))
    assert not _can_be_fused(sgd, {}, nn.Sequential(OnCuda(), nn.Linear(1, 1)))
