"""Every optimizer of torch.optim, and the kinds that people write: trained, saved and resumed, or refused at once."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config
from trainer import ConfigError, Trainer
from trainer.components.optimizer import (
    build_optimizer,
    load_named_state,
    named_state,
    set_learning_rate,
)
from trainer.components.optimizer_modes import begin_training, evaluation_weights
from trainer.config.model_sections import OptimizerConfig

HASHES = ("weights_sha256", "optimizer_sha256")


class Wrapper(Optimizer):
    """Lookahead (Zhang et al., 2019) around an optimizer that it makes and whose groups it shares."""

    def __init__(self, params: Any, lr: float = 0.1, k: int = 2) -> None:
        self.inner = torch.optim.SGD(params, lr=lr, momentum=0.9)
        super().__init__(self.inner.param_groups, {"lr": lr})
        self.param_groups = self.inner.param_groups
        self.k = k
        self.taken = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.inner.step()
        self.taken += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.clone())
                if self.taken % self.k == 0:
                    slow.lerp_(parameter, 0.5)
                    parameter.copy_(slow)


class OwnGroups(Wrapper):
    """As the wrapper, with groups of its own and a state_dict that cannot be loaded."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        params = list(params)
        super().__init__([dict(group) for group in params], lr)
        Optimizer.__init__(self, [dict(group) for group in params], {"lr": lr})

    def state_dict(self) -> dict[str, Any]:
        return {"fast": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("slow")


class Two(Optimizer):
    """Matrices to one optimizer and the rest to another, as Muon is used."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        (group,) = list(params)
        matrices = [p for p in group["params"] if p.ndim == 2]
        others = [p for p in group["params"] if p.ndim != 2]
        self.parts = [
            torch.optim.Muon(matrices, lr=lr),
            torch.optim.AdamW(others, lr=lr / 10),
        ]
        super().__init__(matrices + others, {"lr": lr})

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()


class ByHand(Optimizer):
    """State in every place: attributes, nested entries, keys that are no text, of no parameter, in groups."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.steps = 0
        self.average: dict[Tensor, Tensor] = {}
        self.recent: deque[float] = deque(maxlen=2)
        self.settings = {"scale": lr}
        self.print = print  # no state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.steps += 1
        shared = self.state["all"]  # type: ignore[index]
        shared["norms"] = (*shared.get("norms", ())[-1:], self.steps)
        for group in self.param_groups:
            group["seen"] = [torch.tensor(self.steps)]
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["nested"] = {"m": torch.zeros_like(grad), 3: [None, True]}
                    state[7] = 1.0
                    state["dotted.key"] = float("inf")
                    self.average[parameter] = torch.zeros_like(grad)
                state[7] = 0.9 * state[7] + 0.1 * float(grad.abs().max())
                self.recent.append(state[7])
                state["nested"]["m"].mul_(0.5).add_(grad)
                self.average[parameter].lerp_(state["nested"]["m"], 0.3)
                factor = group["lr"] / (1 + sum(self.recent) + self.steps)
                factor *= sum(shared["norms"]) + group["seen"][0].item()
                parameter.sub_(self.average[parameter], alpha=factor)


class Switched(Optimizer):
    """As schedule-free SGD: trains an interpolation, and is to be evaluated at the average."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "train_mode": False, "k": 0})

    @torch.no_grad()
    def eval(self) -> None:
        self._move(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def train(self) -> None:
        self._move(True, 0.1)

    def _move(self, train: bool, weight: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight)
            group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise Exception("Optimizer was not in train mode when step is called")
            group["k"] += 1
            share = 1 / group["k"]
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.clone())
                parameter.lerp_(z, share)
                parameter.add_(parameter.grad, alpha=group["lr"] * (0.9 * share - 0.1))
                z.sub_(parameter.grad, alpha=group["lr"])


def torch_optimizers() -> list[str]:
    names = []
    for name, value in vars(torch.optim).items():
        if isinstance(value, type) and issubclass(value, Optimizer):
            names.append(name)
    return sorted({*names} - {"Optimizer"})


class Tower(nn.Module):
    """Matrices without biases, which is all that Muon takes."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 4, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


REFUSED = {
    "LBFGS": "runs the model itself, several times a step",
    "SparseAdam": "takes the gradients of embeddings with sparse=True alone",
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "foreach": True},
    "Adam": {"amsgrad": True, "fused": True},
    "AdamW": {"foreach": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
}
OWN = [f"{__name__}.{cls.__name__}" for cls in (Wrapper, OwnGroups, Two, ByHand)]
OWN.append(f"{__name__}.Switched")


def fit(directory: Path, run: str, name: str, **more: Any) -> list[str]:
    """The hashes of a bitwise run of 6 steps with the optimizer `name`."""
    settings = config(
        directory,
        run__name=run,
        run__reproducibility="bitwise",
        optimizer=None,
        schedule__name="cosine",
        schedule__per="step",
        train__precision="fp32",
        batch__micro_size=7,
        **more,
    )
    arguments = ARGUMENTS.get(name.rpartition(".")[2], {})
    section = OptimizerConfig(name=name, lr=0.01, args=arguments)
    object.__setattr__(settings, "optimizer", section)
    data = Points(70, ignored=False)
    data.points = data.points.float()
    model = Tower(bias=not name.endswith(".Muon"))
    summary = Trainer(settings, model=model, train_data=data).fit()
    return [summary[key] for key in HASHES]


def fit_each(directory: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By optimizer, the hashes of the last of these runs, or why it was refused."""
    results: dict[str, Any] = {}
    for name in [*(f"torch.optim.{name}" for name in torch_optimizers()), *OWN]:
        place = directory / name.rpartition(".")[2]
        try:
            for more in runs:
                results[name] = fit(place, "run", name, **more)
        except ConfigError as error:
            results[name] = str(error)
    return results


def test_every_optimizer_resumes_to_equal_bits_or_is_refused(tmp_path: Path) -> None:
    """Also on another number of processes: the run that never stopped has one, the other begins with one or two."""
    stop_and_go_on = [{"train__stop_after": 3}, {"run__resume": "auto"}]
    whole = on_ranks(1, fit_each, tmp_path / "whole", [{}])[0]
    for ranks in (1, 2):
        parts = on_ranks(ranks, fit_each, tmp_path / str(ranks), stop_and_go_on)[0]
        assert parts == whole
    for name, result in whole.items():
        refusal = REFUSED.get(name.rpartition(".")[2])
        if refusal is None:
            assert isinstance(result, list), result
        else:
            assert refusal in result


# ---------------------------------------------------------------- refused at once


class NeedsClosure(Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        assert closure is not None, "needs a closure"


class KeepsAnObject(NeedsClosure):
    def step(self, closure: Any = None) -> None:
        self.state[self.param_groups[0]["params"][0]]["draws"] = [torch.Generator()]


class KeepsSparse(NeedsClosure):
    def step(self, closure: Any = None) -> None:
        parameter = self.param_groups[0]["params"][0]
        self.state[parameter]["mask"] = torch.eye(2).to_sparse()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (f"{__name__}.NeedsClosure", {}, "cannot take a step here: AssertionError"),
        (f"{__name__}.KeepsAnObject", {}, r'draws.layers.0.weight/0" is of type Gen'),
        (f"{__name__}.KeepsSparse", {}, r'mask.layers.0.weight" is a tensor of'),
        ("torch.optim.LBFGS", {}, "runs the model itself"),
        ("torch.optim.Muon", {}, "Muon only supports 2D parameters"),
        ("adam", {"capturable": True}, "cannot take a step here: "),
        ("torch.optim.SparseAdam", {}, "that of layers.0.weight is dense"),
    ],
)
def test_what_cannot_train_here_is_refused_and_leaves_the_model_alone(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    model = Tower()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=message) as caught:
        build_optimizer(OptimizerConfig(name=name, args=arguments), model)
    assert caught.value.key.startswith("optimizer")
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value) and parameter.grad is None


def test_sparse_gradients_are_for_those_who_take_them() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    for name in ("sgd", "torch.optim.SparseAdam", "torch.optim.Adagrad"):
        build_optimizer(OptimizerConfig(name=name), model)
    with pytest.raises(ConfigError, match='"adam" takes no sparse gradient'):
        build_optimizer(OptimizerConfig(name="adam"), model)
    # Its momentum would be sparse as well, and fail at the first checkpoint.
    with pytest.raises(ConfigError, match="weight has a sparse gradient"):
        build_optimizer(OptimizerConfig(name="sgd", args={"momentum": 0.9}), model)


# ---------------------------------------------------------------- rates and modes


@pytest.mark.parametrize("kind", [Wrapper, OwnGroups, Two])
def test_the_schedule_reaches_the_inner_optimizer(kind: type[Any]) -> None:
    section = OptimizerConfig(name=f"{__name__}.{kind.__name__}", lr=0.4)
    optimizer: Any = build_optimizer(section, Tower())
    set_learning_rate(optimizer, 0.25)
    parts = optimizer.parts if kind is Two else [optimizer.inner]
    rates = [part.param_groups[0]["lr"] for part in parts]
    assert rates == pytest.approx([0.1, 0.01] if kind is Two else [0.1])


def test_the_weights_to_evaluate_leave_those_to_train_alone() -> None:
    model = Tower()
    section = OptimizerConfig(name=f"{__name__}.Switched")
    optimizer = build_optimizer(section, model)
    begin_training(optimizer)
    for _ in range(3):
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = model.layers[0].weight
    z = optimizer.state[weight]["z"]
    trained = weight.detach().clone()
    with evaluation_weights(optimizer):
        # y = 0.1 z + 0.9 x
        assert torch.allclose(0.1 * z + 0.9 * weight, trained)
        assert not torch.equal(weight, trained)
    assert torch.equal(weight, trained)
    assert optimizer.param_groups[0]["train_mode"]
    assert optimizer.param_groups[0]["k"] == 3  # the trial has left nothing behind


def test_the_best_model_has_the_weights_to_evaluate(tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        run__name="run",
        loss__ignore_index=-1,
        optimizer__name=f"{__name__}.Switched",
        optimizer__momentum=None,
        train__epochs=1,
    )
    data = Points()
    trainer = Trainer(settings, model=Tower(), train_data=data, val_data=data)
    summary = trainer.fit()
    trainer.load_best()
    # The weights of the file give the loss that was measured.
    assert trainer.run.evaluate()["loss"] == summary["best"]


def test_an_unchanged_attribute_follows_the_config() -> None:
    """A resume with another `k` uses the new one; what training changed comes from the checkpoint."""
    model = Tower()

    def make(k: int) -> Any:
        section = OptimizerConfig(name=f"{__name__}.Wrapper", args={"k": k})
        return build_optimizer(section, model)

    old = make(2)
    model(torch.ones(2, 6)).square().sum().backward()
    old.step()
    new = make(5)
    load_named_state(new, model, *named_state(old, model))
    assert (new.k, new.taken) == (5, 1)
    assert new.param_groups is new.inner.param_groups
    weight = model.layers[0].weight
    momentum = new.inner.state[weight]["momentum_buffer"]
    assert torch.equal(momentum, old.inner.state[weight]["momentum_buffer"])


def test_strides_come_back_because_products_depend_on_them() -> None:
    model = Tower()
    weight = model.layers[0].weight
    old = build_optimizer(OptimizerConfig(name="sgd"), model)
    turned = torch.randn(6, 8).t()
    old.state[weight] = {"turned": turned, "nested": [turned.clone()]}
    tensors, numbers = named_state(old, model)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    new = build_optimizer(OptimizerConfig(name="sgd"), model)
    load_named_state(new, model, tensors, numbers)
    state = new.state[weight]
    for value in (state["turned"], *state["nested"]):
        assert torch.equal(value, turned) and value.stride() == turned.stride()
