"""What `explain` shows, against the same step by hand in fp64."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from trainer import Observer
from trainer.commands.explain import main
from trainer.commands.explain_output import print_lesson
from trainer.config.load import load
from trainer.core.run import Run
from trainer.errors import ConfigError
from trainer.exact.plan import Step
from trainer.inspection.autograd_chain import chain
from trainer.inspection.explain import Dissection

SIZE, LR, FIRST_VALUES = 13, 0.1, 4
BASE = [
    *("data.name=fake", "data.image_size=8", "data.channels=1", "data.size=100"),
    *(f"batch.size={SIZE}", "batch.micro_size=5", "train.precision=fp64"),
    *(f"optimizer.lr={LR}", "schedule.name=constant", "wandb.mode=disabled"),
]
EXACT: dict[str, Any] = {"rel": 1e-11, "abs": 1e-14}


def plain(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, num_classes)
    )


def explained(
    *overrides: str,
) -> tuple[dict[str, Any], nn.Module, list[tuple[Tensor, Tensor]]]:
    """The report, the model as it was before, and the samples of the first two steps."""
    dissected = Dissection(load(None, [*BASE, *overrides]))
    trainer = dissected.trainer
    before = copy.deepcopy(trainer.module)
    pairs = [
        trainer.run.data.train[int(i)] for i in trainer.plan.permutation(0)[: 2 * SIZE]
    ]
    images, targets = (
        torch.stack([image for image, _ in pairs]),
        torch.tensor([target for _, target in pairs]),
    )
    return (
        dissected.report(),
        before,
        list(
            zip((images.double() / 255).split(SIZE), targets.split(SIZE), strict=True)
        ),
    )


def shows(summary: dict[str, Any], tensor: Tensor) -> None:
    assert summary["shape"] == list(tensor.shape)
    assert summary["norm"] == pytest.approx(float(tensor.norm()), **EXACT)
    assert summary["first"] == pytest.approx(
        tensor.flatten()[:FIRST_VALUES].tolist(), **EXACT
    )


def gradients_of_two_steps() -> None:
    report, model, samples = explained("model.name=tests.test_explain.plain")
    untrained, by_hand = copy.deepcopy(model), list[list[Tensor]]()
    parameters = list(model.parameters())
    for images, targets in samples:
        loss = F.cross_entropy(model(images), targets)
        by_hand.append(list(torch.autograd.grad(loss, parameters)))
        if len(by_hand) == 1:
            assert report["loss"]["mean"] == pytest.approx(loss.item(), **EXACT)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, by_hand[-1], strict=True):
                parameter.sub_(LR * gradient)
    for name, first, second in zip(
        dict(model.named_parameters()), *by_hand, strict=True
    ):
        stages = report["gradients"][name]
        assert stages["before"] is None
        assert stages["after_first"]["norm"] != pytest.approx(
            stages["after_last"]["norm"], rel=1e-3
        )
        shows(stages["after_last"], first)  # the full batch's
        shows(stages["reduced"], first)
        shows(report["updates"][name], -LR * first)
        shows(report["without_zero_grad"][name]["first"], first)
        shows(report["without_zero_grad"][name]["second"], second)
        shows(report["without_zero_grad"][name]["both"], first + second)
    parts = report["loss"]["micro_batches"]
    assert (
        [part["weight"] for part in parts]
        == report["batch"]["micro_batches"]
        == [5, 4, 4]
    )
    assert sum(part["loss_sum"] for part in parts) / SIZE == pytest.approx(
        report["loss"]["mean"], **EXACT
    )
    assert report["loss"]["epoch"] == {
        "steps": 8,
        "step_size": SIZE,
        "last_step_size": 100 - 7 * SIZE,
    }
    model, (images, targets) = untrained, samples[0]
    alone = F.cross_entropy(
        model(images[:FIRST_VALUES]), targets[:FIRST_VALUES], reduction="none"
    )
    assert [
        sample["loss_sum"] for sample in report["batch"]["samples"]
    ] == pytest.approx(alone.tolist(), **EXACT)


def test_loss_gradients_update_and_a_forgotten_zero_grad_are_those_by_hand() -> None:
    on_ranks(1, gradients_of_two_steps)


def buffers(per: str) -> None:
    report, model, samples = explained(
        "model.name=small_cnn", f"batch_norm.momentum_per={per}"
    )
    momentum = 0.1 if per == "micro_batch" else 1 - 0.9 ** (1 / 3)
    assert isinstance(model, nn.Sequential)
    convolved = model[0](samples[0][0]).detach()
    mean, var = torch.zeros(32).double(), torch.ones(32).double()
    stages = report["batch_norm"]["layers"]["1"]
    shows(stages["before"]["mean"], mean)
    for place, part in enumerate(convolved.split([5, 4, 4])):
        mean = (1 - momentum) * mean + momentum * part.mean((0, 2, 3))
        var = (1 - momentum) * var + momentum * part.var((0, 2, 3))
        if place == 0:
            shows(stages["after_first"]["mean"], mean)
    shows(stages["after"]["mean"], mean)
    shows(stages["after"]["var"], var)
    assert (stages["before"]["batches"], stages["after"]["batches"]) == (0, 3)


@pytest.mark.parametrize("per", ["micro_batch", "step"])
def test_batch_norm_buffers_follow_the_formula(per: str) -> None:
    on_ranks(1, buffers, per)


def weighted() -> None:
    """Ignored targets: after the last backward the gradient is divided by samples, when reduced, by what counts."""
    report, model, samples = explained(
        "model.name=tests.test_explain.plain", "loss.ignore_index=3"
    )
    images, targets = samples[0]
    loss = F.cross_entropy(model(images), targets, ignore_index=3)
    valid_targets = int((targets != 3).sum())
    assert valid_targets < SIZE
    for (name, parameter), stages in zip(
        model.named_parameters(), report["gradients"].values(), strict=True
    ):
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        assert name in report["gradients"]
        shows(stages["after_last"], gradient * valid_targets / SIZE)
        shows(stages["reduced"], gradient)


def test_ignored_targets() -> None:
    on_ranks(1, weighted)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (
            nn.Linear(3, 3),
            nn.Linear(3, 3),
            nn.Linear(3, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.inner(x).relu()
        out: Tensor = self.last(x)
        return out


def test_the_chain_passes_every_layer_and_names_what_each_node_gives() -> None:
    nodes = chain(Residual()(torch.ones(2, 3)).sum(), Residual())
    assert nodes == []  # another model's parameters
    model = Residual()
    nodes = chain(model(torch.ones(2, 3)).sum(), model)
    layers = [
        "AddmmBackward0",
        "AddBackward0",
        "ReluBackward0",
        "AddmmBackward0",
        "AddmmBackward0",
    ]
    assert [node["name"] for node in nodes] == [
        "SumBackward0",
        *layers,
        "TBackward0",
        "torch::autograd::AccumulateGrad",
    ]
    parameter_sets = [set(node["parameters"]) for node in nodes if node["parameters"]]
    both = [{f"{name}.weight", f"{name}.bias"} for name in ("last", "inner")]
    # The first weight is a transposition further on.
    assert parameter_sets == [*both, {"first.bias"}, {"first.weight"}]


def printed(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([*arguments])
    return out.getvalue()


CALLS = [
    ["configs/digits.yaml"],
    ["configs/lessons/parabola.yaml"],
    ["configs/lessons/patterns.yaml", "train.max_steps=1"],
    [
        "configs/lessons/batch_norm.yaml",
        "run.reproducibility=bitwise",
        "train.precision=bf16",
    ],
    ["configs/lessons/patterns.yaml", "--json"],
]


def test_lessons_of_100_columns_json_and_no_run_directory(tmp_path: Path) -> None:
    more = [f"run.dir={tmp_path}", "wandb.mode=disabled"]
    ((*texts, as_json),) = on_ranks(
        1, lambda: [printed(*call, *more) for call in CALLS]
    )
    for text in texts:
        assert max(map(len, text.splitlines())) == 100
        assert [f"{number} · " in text for number in range(1, 8)] == [True] * 7
    report = json.loads(as_json)
    assert report["parameters"] == 64
    assert report["batch_norm"]["layers"] == {}
    assert list(tmp_path.iterdir()) == []


def of_a_resnet() -> list[str]:
    config = load(
        None,
        ["model.name=resnet18", "data.name=fake", "batch.size=4", "batch.micro_size=2"],
    )
    report, texts = Dissection(config).report(), []
    for rows in (10, None):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            print_lesson(report, rows)
        texts.append(out.getvalue())
    return texts


def test_large_models_are_cut_short_unless_all_is_asked_for() -> None:
    ((short, long),) = on_ranks(1, of_a_resnet)
    assert "52 more (--all)" in short
    assert "layer3.0.conv1.weight" not in short.partition("4 · ")[2]
    assert long.partition("4 · ")[2].count("layer3.0.conv1.weight") == 3
    assert "more (--all)" not in long


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.yaml", "b.yaml"], "b.yaml: is one argument too many"),
        (["--jsn"], 'did you mean "json"'),
        (["configs/digit.yaml"], 'did you mean "digits.yaml"'),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(arguments)


def test_it_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        main([])


class NeedsBegin(Observer):
    """An observer that prepares itself in `begin`, as most do."""

    steps: list[int]

    def begin(self, run: Run) -> None:
        self.steps = []

    def step(self, step: Step) -> None:
        self.steps.append(step.number)


def test_observers_of_the_config_see_its_steps() -> None:
    dissected = Dissection(
        load(None, [*BASE, "observers=[{name: tests.test_explain.NeedsBegin}]"])
    )
    dissected.report()
    (observer,) = dissected.trainer.observers
    assert isinstance(observer, NeedsBegin)
    assert observer.steps == [1, 2, 2], "the second step once more, without zero_grad"
