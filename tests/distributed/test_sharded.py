"""Parameters shared out over the processes (`train.parallel=fsdp`): the same run as one process that holds them all."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

# Imported once, here, and not in each rank again.
import torch.distributed.fsdp
import torch.distributed.tensor
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    Images,
    Points,
    config,
    fitted,
    header_of,
    largest_difference,
    mlp,
    rows_of,
)
from trainer import ConfigError, LockstepError, Task, Trainer
from trainer.components.models import small_cnn
from trainer.config.sharded_parameters import NEEDS
from trainer.core.observers import Observer
from trainer.core.run import Run
from trainer.exact import sharding
from trainer.exact.block_calls import BlockCalls
from trainer.exact.block_outputs import BlockOutputs
from trainer.exact.plan import Step
from trainer.exact.sharding import blocks_of
from trainer.exact.shards import is_shard, local_part, whole
from trainer.storage.digest import digest, hexadecimal

BOUND = 1e-12


@pytest.fixture(autouse=True)
def small_layers_are_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of these models are all too small to be gathered by themselves."""
    monkeypatch.setattr(sharding, "SMALL_BYTES", 0)


class Blocks(nn.Module):
    """Repeated blocks, norm layers, a buffer that forwards move, and dimensions that 2 and 3 do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(2, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.blocks = nn.ModuleList([_Block(45) for _ in range(3)])
        self.head = nn.Linear(45, 4)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean += images.mean()
        hidden = torch.tanh(self.norm(self.first(images))).flatten(1)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        result: Tensor = self.head(hidden)
        return result


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.dropout(torch.tanh(self.norm(self.dense(hidden))))
        return result


# 88 = 3 × 28 + 4: the last step of an epoch is one micro-batch, which leaves other ranks idle; a full step's four are
# 2+1+1 on three. 20 validation samples are 7 batches.
def trainer_of(directory: Path, parallel: str, **changes: Any) -> Trainer:
    settings = {
        "run__name": "run",
        "run__resume": "auto",
        "run__proof": "off",
        "train__parallel": parallel,
        "train__max_grad_norm": 0.5,
        "batch_norm__recalibrate": 4,
        "batch__micro_size": 7,
        "batch__eval_size": 3,
        "optimizer__name": "adamw",
        "optimizer__momentum": None,
        "optimizer__lr": 0.01,
        "optimizer__decay_norm_and_bias": False,
        "loss__class_weights": [1.0, 0.2, 3.0, 0.7],
        "ema__decay": 0.9,
        "ema__every": 3,
        "best__metric": "val_ema/loss",
        "train__mix": {"mixup": 0.4, "prob": 0.5},
    }
    return Trainer(
        config(directory, **(settings | changes)),
        model=Blocks(),
        train_data=Images(88),
        val_data=Images(20),
        test_data=Images(10),
        observers=[HeldGradients()],
    )


class HeldGradients(Observer):
    """Notes how many elements of the gradient this rank holds before an update."""

    may_stop = False

    def begin(self, run: Run) -> None:
        self._module = run.module
        self.elements = 0

    def gradient(self, step: Step) -> None:
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        self.elements = sum(local_part(gradient).numel() for gradient in gradients)


class Killed(Observer):
    """Kills its process in the step `at`, before the update."""

    may_stop = False

    def __init__(self, at: int) -> None:
        self._at = at

    def gradient(self, step: Step) -> None:
        if step.number == self._at:
            os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(directory: Path) -> None:
    """What is left of it is the checkpoint at the end of the first epoch, if that was complete."""
    trainer = trainer_of(directory, "fsdp")
    trainer.observers.add(Killed(at=6))
    trainer.fit()


def results_of(trainer: Trainer) -> dict[str, Any]:
    """What a run has come to, whole, and what this rank holds of it."""
    held, total = memory_of(trainer)
    gradients = next(o for o in trainer.observers if isinstance(o, HeldGradients))
    parameters = sum(p.numel() for p in trainer.module.parameters())
    return {
        "model": whole_state(trainer),
        "evaluation": trainer.evaluate(),
        "held": held / total,
        "held of gradient": gradients.elements / parameters,
        "parallel": header_of(trainer, Path()).get("parallel"),
        "digest": trainer.digest(),
        "digest of whole": digest_of_whole(trainer),
    }


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    state = trainer.module.state_dict()
    return {name: whole(tensor).clone() for name, tensor in state.items()}


def digest_of_whole(trainer: Trainer) -> str:
    parameters = trainer.module.named_parameters()
    return hexadecimal(digest({name: whole(p) for name, p in parameters}))


def memory_of(trainer: Trainer) -> tuple[int, int]:
    """Elements of parameters and optimizer state that this rank holds, and of the whole."""
    tensors: list[Tensor] = list(trainer.module.parameters())
    for entries in trainer.optimizer.state.values():
        tensors += [value for value in entries.values() if value.dim()]
    held = sum(local_part(tensor).numel() for tensor in tensors)
    return held, sum(tensor.numel() for tensor in tensors)


def run(directory: Path, parallel: str, **changes: Any) -> dict[str, Any]:
    trainer = trainer_of(directory, parallel, **changes)
    trainer.fit()
    return results_of(trainer)


def runs_on_one_process(directory: Path) -> dict[str, Any]:
    run(directory / "to fsdp", "ddp", train__stop_after=5)
    return run(directory / "whole", "ddp")


def runs_with_shards(directory: Path) -> list[dict[str, Any]]:
    run(directory / "to ddp", "fsdp", train__stop_after=5)
    return [
        run(directory / "shards", "fsdp"),
        run(directory / "to fsdp", "fsdp"),
    ]


def last_checkpoint(directory: Path) -> Path:
    checkpoints = directory / "run" / "checkpoints"
    return checkpoints / (checkpoints / "last").read_text().strip()


def optimizer_state(directory: Path) -> dict[str, Tensor]:
    return load_file(last_checkpoint(directory) / "optimizer.safetensors")


def averages(directory: Path) -> dict[str, Tensor]:
    return load_file(last_checkpoint(directory) / "ema.safetensors")


def best_model(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "run" / "best" / "model.safetensors")


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert largest_difference(actual["model"], expected["model"]) < BOUND
    for name, value in expected["evaluation"].items():
        assert actual["evaluation"][name] == pytest.approx(value, abs=BOUND)


def assert_same_files(actual: Path, expected: Path) -> None:
    """Rows, the best model, the average, the optimizer's state and the evaluation of the test set."""
    pairs = zip(rows_of(actual / "run"), rows_of(expected / "run"), strict=True)
    for row, other in pairs:
        # Of weights that differ in their last bits.
        row.pop("digest", None), other.pop("digest", None)
        assert row == pytest.approx(other, rel=1e-9, abs=BOUND)
    assert largest_difference(best_model(actual), best_model(expected)) < BOUND
    assert largest_difference(averages(actual), averages(expected)) < BOUND
    states = optimizer_state(actual), optimizer_state(expected)
    assert largest_difference(*states) < 1e-9
    summaries = []
    for path in (actual, expected):
        summaries.append(json.loads((path / "run" / "summary.json").read_text()))
    loss, other_loss = (summary["test/loss"] for summary in summaries)
    assert loss == pytest.approx(other_loss, rel=1e-9)


def test_equals_one_process_and_changes_places_with_ddp(tmp_path: Path) -> None:
    """AdamW, clipping, class weights, norm layers, dropout, idle ranks, uneven evaluations, resumes, a kill."""
    (expected,) = on_ranks(1, runs_on_one_process, tmp_path)
    for shards, resumed in on_ranks(2, runs_with_shards, tmp_path):
        assert_same(shards, expected)
        assert_same(resumed, expected)
        assert shards["parallel"].endswith(
            "in 2 parts, gathered in 3 blocks and a rest"
        )
        assert shards["digest"] == shards["digest of whole"]
        # Rows are rounded up to whole ones, so a rank may hold a little more than its share.
        assert max(shards["held"], shards["held of gradient"]) < 0.55
    (resumed,) = on_ranks(1, run, tmp_path / "to ddp", "ddp")
    assert_same(resumed, expected)
    with pytest.raises(EOFError):
        on_ranks(2, run_until_killed, tmp_path / "3")
    for shards in on_ranks(3, run, tmp_path / "3", "fsdp"):
        assert_same(shards, expected)
        assert max(shards["held"], shards["held of gradient"]) < 0.4
    for name in ("shards", "to fsdp", "to ddp", "3"):
        assert_same_files(tmp_path / name, tmp_path / "whole")


# ---------------------------------------------------------------- other models, and what ends a run


class HalfUnused(nn.Module):
    """The second head is used by micro-batches that hold a negative first input only, and the third by none."""

    def __init__(self, *, has_third: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.always, self.sometimes = nn.Linear(6, 4), nn.Linear(6, 4)
        self.never = nn.Linear(6, 4) if has_third else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.always(x)
        return out + self.sometimes(x) if x[0, 0] < 0.4 else out


class Branches(nn.Module):
    """Four blocks, two of which the second output alone depends on, and with `has_third` one that none does."""

    def __init__(self, *, has_third: bool = False) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(4 + has_third)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.blocks[1](torch.tanh(self.blocks[0](x)))
        second = self.blocks[3](torch.tanh(self.blocks[2](first)))
        for block in self.blocks[4:]:
            block(first)
        return self.head(first), self.head(second), x


class SometimesBoth(Task):
    """The second output counts in micro-batches that hold a small first input only."""

    def loss_sum(self, output: tuple[Tensor, ...], targets: Tensor) -> Any:
        first, second, x = output
        logits = first + second if x[0, 0] < 0.4 else first
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        return loss, len(targets)


class Tied(nn.Module):
    """Its last layer has the weights of the first, which are used transposed, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(6, 4)
        self.blocks = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        self.blocks[1].weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(torch.tanh(self.first(x)), self.first.weight.T)
        result: Tensor = self.blocks(hidden)
        return result


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.scale * self.dense(x)
        return result


class TrainedLoss(Task):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def loss_sum(self, output: Tensor, targets: Tensor) -> Any:
        loss = nn.functional.cross_entropy(output + self.bias, targets, reduction="sum")
        return loss, len(targets)


class WholeLoss(Task):
    whole_step = True

    def loss_sum(self, output: Tensor, targets: Tensor) -> Any:
        return (output.sum(0) ** 2).sum(), len(targets)


def points(sample: int | None = None) -> Points:
    """60 points, one of which may be no number."""
    data = Points(60, ignored=False)
    if sample is not None:
        data.points[sample] = torch.nan
    return data


def run_points(
    directory: Path,
    model: nn.Module,
    *,
    bad: int | None = None,
    bad_in_validation: int | None = None,
    task: Task | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    settings = config(
        directory,
        run__proof="off",
        batch__micro_size=4,
        batch__eval_size=5,
        train__epochs=1,
        **changes,
    )
    trainer = fitted(
        settings,
        model,
        train_data=points(bad),
        val_data=points(bad_in_validation),
        task=task,
    )
    return whole_state(trainer)


def runs_of_points(directory: Path, parallel: str) -> list[dict[str, Tensor]]:
    """Heads and blocks that some ranks use and others do not, shared and frozen weights, rates by layer, a step left
    out.
    """
    shared: dict[str, Any] = {"train__parallel": parallel}
    model = mlp()  # which goes on in a second run
    return [
        run_points(directory / "half", HalfUnused(), **shared),
        run_points(directory / "tied", Tied(), run__figures=True, **shared),
        run_points(directory / "parts", Branches(), task=SometimesBoth(), **shared),
        run_points(directory / "layers", model, optimizer__layer_decay=0.5, **shared),
        run_points(directory / "frozen", mlp(), model__freeze=["0"], **shared),
        run_points(
            directory / "skip", model, bad=17, train__non_finite="skip", **shared
        ),
    ]


def test_other_models_are_the_same_as_on_one_process(tmp_path: Path) -> None:
    (expected,) = on_ranks(1, runs_of_points, tmp_path / "1", "ddp")
    for actual in on_ranks(3, runs_of_points, tmp_path / "3", "fsdp"):
        for weights, others in zip(actual, expected, strict=True):
            assert largest_difference(weights, others) < BOUND
    tables = []
    for directory in (tmp_path / "1", tmp_path / "3"):
        (table,) = directory.glob("tied/*/figures/per_class.csv")
        tables.append(table.read_text())
    assert tables[0] == tables[1]


def message_of(*args: Any, **more: Any) -> str:
    try:
        run_points(*args, train__parallel="fsdp", **more)
    except (ConfigError, LockstepError) as error:
        return str(error)
    return "no error"


def refused_runs(directory: Path) -> list[str]:
    return [
        message_of(directory / "nan", mlp(), bad=17),
        message_of(directory / "val", mlp(), bad_in_validation=33),
        message_of(directory / "unused", HalfUnused(has_third=True)),
        message_of(directory / "block", Branches(has_third=True), task=SometimesBoth()),
        message_of(directory / "scalar", Scalar()),
        message_of(directory / "loss", mlp(), task=TrainedLoss()),
        message_of(directory / "whole", mlp(), task=WholeLoss()),
    ]


def test_what_ends_a_run_ends_it_on_every_rank_with_the_same_message(
    tmp_path: Path,
) -> None:
    first, second = on_ranks(2, refused_runs, tmp_path)
    assert first == second
    expected = [
        "not finite already in the data: 17",
        "it is of validation samples 33",
        "2 parameters got no gradient in the first step (never.weight, never.bias)",
        "2 parameters got no gradient in the first step (blocks.4.weight, blocks.4.bias)",
        "train.parallel: fsdp cuts parameters along their first dimension, and scale is a single number",
        "train.parallel: fsdp shares out the model's parameters, and the loss has some of its own",
        "train.parallel: fsdp cannot be combined with a loss of the whole step",
    ]
    for message, part in zip(first, expected, strict=True):
        assert part in message


OTHER_VALUES = {
    "run.reproducibility": "bitwise",
    "run.proof": "strict",
    "train.precision": "fp16",
    "train.compile": True,
    "train.channels_last": True,
    "train.find_unused_parameters": True,
    "batch_norm.mode": "sync",
    "model.unfreeze": {1: "backbone"},
    "data.bad_samples": "quarantine",
    "wandb.log_histograms_every": 10,
    "batch.fuse": 2,
    "optimizer.name": "torch.optim.Muon",
}


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_what_cannot_be_combined_is_refused_by_name(tmp_path: Path, key: str) -> None:
    assert {need.key for need in NEEDS} <= OTHER_VALUES.keys()
    changes = {key.replace(".", "__"): OTHER_VALUES[key], "train__parallel": "fsdp"}
    with pytest.raises(
        ConfigError, match=r"cannot be combined with train.parallel=fsdp"
    ):
        config(tmp_path, **changes)


def test_blocks_are_items_of_containers_or_what_the_model_names() -> None:
    model = Blocks()
    assert blocks_of(model) == ["blocks.0", "blocks.1", "blocks.2"]
    nested = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(model, model.head))
    # The head is shared by two of the items, so it is no part of a block.
    assert blocks_of(nested) == ["0"]
    model._no_split_modules = ["Linear", "Conv2d"]  # type: ignore[assignment]
    assert blocks_of(model) == [
        "first",
        "blocks.0.dense",
        "blocks.1.dense",
        "blocks.2.dense",
        "head",
    ]


def test_small_layers_are_gathered_with_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    with torch.device("meta"):
        assert blocks_of(small_cnn(10, 3)) == []
        # 4 MB, 8 kB, and layers of 400 kB each.
        big, small = nn.Linear(1000, 1000), nn.Linear(1000, 2)
        few = [nn.Linear(100, 1000) for _ in range(10)]
        many = [nn.Linear(100, 1000) for _ in range(100)]
    assert blocks_of(nn.Sequential(big, small, *few)) == ["0"]
    # These would be 40 MB with the model, at all times.
    names = blocks_of(nn.Sequential(big, small, *many))
    assert names == ["0", *map(str, range(2, 102))]
    named = nn.Sequential(big, small)
    named._no_split_modules = ["Linear"]  # type: ignore[assignment]
    assert blocks_of(named) == ["0", "1"]


def test_a_backward_reaches_every_block_in_the_same_order_whatever_the_loss_uses() -> (
    None
):
    model = Branches(has_third=True)
    names = blocks_of(model)
    order: list[str] = []
    for name in names:

        def note(
            part: nn.Module, inputs: Any, output: Tensor, name: str = name
        ) -> None:
            output.register_hook(lambda gradient: order.append(name))

        model.get_submodule(name).register_forward_hook(note)
    outputs = BlockOutputs(model, names)
    task = SometimesBoth()
    for first in (0.0, 1.0):
        points, targets = torch.full((2, 6), first), torch.tensor([1, 3])
        outputs.begin()
        loss, _ = task.loss_sum(model(points), targets)
        expected = torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, allow_unused=True
        )
        order.clear()
        torch.autograd.backward(outputs.tie(loss))
        assert order == ["blocks.4", "blocks.3", "blocks.2", "blocks.1", "blocks.0"]
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            if parameter.grad is None or gradient is None:
                assert parameter.grad is gradient
            else:
                assert torch.equal(parameter.grad, gradient)
            parameter.grad = None


class SkipsBlocks(nn.Module):
    """A random depth, as some models have it in training: skipped, or a block too many."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        self.order = [0, 1, 2]
        self.fixed = 3  # from this one on, without gradients

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            with torch.set_grad_enabled(torch.is_grad_enabled() and index < self.fixed):
                x = self.blocks[index](x)
        return x


@pytest.mark.parametrize(
    ("order", "what"),
    [
        ([0, 2], 'calls "blocks.2" out of turn'),
        ([0, 1], 'leaves out "blocks.2"'),
        ([0, 1, 2, 2], 'calls "blocks.2" out of turn'),
        ([2, 1, 0], 'calls "blocks.2" out of turn'),
        ([0, 1, 2], 'calls "blocks.2" without gradients'),
    ],
)
def test_a_forward_that_calls_other_blocks_is_refused(
    order: list[int], what: str
) -> None:
    """Else ranks would gather one block with parts of another."""
    model = SkipsBlocks()
    BlockCalls(model, blocks_of(model))
    model(torch.ones(2))
    model(torch.ones(2))
    model.eval().order = [1]  # evaluation may be another function
    model(torch.ones(2))
    model.train().order = order
    if order == [0, 1, 2]:
        model.fixed = 2
    with pytest.raises(ConfigError, match=what):
        model(torch.ones(2))


def test_one_process_holds_the_whole_model_and_refuses_what_several_would(
    tmp_path: Path,
) -> None:
    trainer = trainer_of(tmp_path, "fsdp")
    assert not any(map(is_shard, trainer.module.parameters()))
    assert "one process" in header_of(trainer, tmp_path)["parallel"]
    assert "scale is a single number" in message_of(tmp_path, Scalar())
