"""NaN and infinities: told at the step that brings them, on every rank alike, and kept in no file."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config, mlp, state
from trainer import LockstepError, Task, Trainer, WeightedSum
from trainer.exact.finite import CAPACITY, FiniteFlags, first_not_finite
from trainer.exact.plan import Plan
from trainer.reporting.jsonl import read_rows
from trainer.storage import checkpoint

EPOCHS, STEPS = 3, 4  # 103 samples by 28: the last step of an epoch has 19


def plan() -> Plan:
    return Plan(
        samples=103, batch_size=28, micro_size=7, ranks=1, epochs=EPOCHS, seed=0
    )


def sample_of(epoch: int, step_in_epoch: int, position: int = -1) -> int:
    step = plan().step(epoch * STEPS + step_in_epoch)
    ids = plan().sample_ids(step, 0, len(step.micro_batches))
    return int(ids[position])


class Marked(Points):
    """One sample, `marked`, is 0 everywhere: in the epochs before `from_step`, it is as it was."""

    def __init__(self, marked: int | None, value: float = 0.0) -> None:
        super().__init__(ignored=False)
        self.marked = marked
        self.value = value

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        point, label = super().__getitem__(i)
        return (point * 0 + self.value if i == self.marked else point), label


class Rooted(Task):
    """Cross-entropy and a root, whose gradient at a sample of zeros is NaN, while the loss there is finite."""

    metrics = ("accuracy",)

    def predict(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return model(inputs), inputs.square().sum(1)

    def loss_sum(self, output: Any, targets: Tensor) -> WeightedSum:
        scores, squares = output
        roots = (squares * scores[:, 0].square()).sqrt().sum()
        total = F.cross_entropy(scores, targets, reduction="sum") + 1e-3 * roots
        return WeightedSum(total, len(targets))

    def metric_sums(self, output: Any, targets: Tensor) -> dict[str, WeightedSum]:
        return {
            "accuracy": WeightedSum(
                (output[0].argmax(1) == targets).sum(), len(targets)
            )
        }


def fit(directory: Path, train: Points, **more: Any) -> Trainer:
    changes = {
        "batch__micro_size": 7,
        "train__epochs": EPOCHS,
        "train__log_every": 100,
        "best__metric": "val/accuracy",
        "best__mode": "max",
        "run__resume": "auto",
        **more.pop("changes", {}),
    }
    parts = {"model": mlp(), "task": Rooted(), "val_data": Points(40, ignored=False)}
    trainer = Trainer(config(directory, **changes), train_data=train, **(parts | more))
    trainer.fit()
    return trainer


def failure(directory: Path, train: Points, **more: Any) -> str:
    with pytest.raises(LockstepError) as caught:
        fit(directory, train, **more)
    return str(caught.value)


def files_are_finite(run: Path) -> int:
    """Assert that no file of a run holds a number that is not finite; returns how many there are."""
    files = list(run.rglob("*.safetensors"))
    for file in files:
        assert first_not_finite(load_file(file)) is None, file
    return len(files)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("epochs", [1, EPOCHS])
@pytest.mark.parametrize("step_in_epoch", [1, STEPS - 1])
def test_a_gradient_that_is_nan_at_any_step(
    tmp_path: Path, ranks: int, epochs: int, step_in_epoch: int
) -> None:
    """In the last epoch, in its second or its last step: the run's last one."""
    number = (epochs - 1) * STEPS + step_in_epoch + 1
    marked = sample_of(epochs - 1, step_in_epoch)
    # Zeros come in every epoch. Before the last one the run is stopped and goes on with them.
    changes = {"train__epochs": epochs}
    if epochs > 1:
        on_ranks(
            ranks,
            lambda: (
                fit(tmp_path, Marked(None), changes={"train__max_steps": STEPS * 2})
                and None
            ),
        )
    messages = on_ranks(ranks, failure, tmp_path, Marked(marked), changes=changes)
    assert len(set(messages)) == 1
    start = f"the gradient is not finite from step {number} (epoch {epochs}) on"
    assert messages[0].startswith(start), messages[0]
    assert f"replay {tmp_path / 'run'} --step {number}" in messages[0]
    assert str(marked) in messages[0] or "more" in messages[0]
    count = files_are_finite(tmp_path / "run")
    assert bool(count) == (epochs > 1)
    # Nothing is poisoned: without the sample the run goes on.
    trainer = on_ranks(1, lambda: state(fit(tmp_path, Marked(None))))[0]
    assert all(value.isfinite().all() for value in trainer.values())


def test_the_weights_stay_as_before_the_step(tmp_path: Path) -> None:
    """On the CPU, where asking the device costs nothing."""
    marked = sample_of(0, 2)
    trainer = Trainer(
        config(tmp_path, batch__micro_size=7, train__epochs=1, train__log_every=100),
        model=mlp(),
        task=Rooted(),
        train_data=Marked(marked),
    )
    with pytest.raises(LockstepError, match="from step 3"):
        trainer.fit()
    before = Trainer(
        config(tmp_path / "b", batch__micro_size=7, train__epochs=1),
        model=mlp(),
        task=Rooted(),
        train_data=Marked(marked),
    )
    before.start()
    for step in before.plan.steps():
        if step.number == 3:
            break
        before.train_step(step)
    for name, value in state(before).items():
        assert torch.equal(trainer.module.state_dict()[name], value)


class OneInfiniteLoss(Task):
    """The loss of class 3 is infinite; no gradient is."""

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        total = F.cross_entropy(output, targets, reduction="sum")
        is_bad = (targets == 9).any()
        return WeightedSum(
            total + torch.where(is_bad, torch.inf, 0.0).detach(), len(targets)
        )


class OneOfClassNine(Points):
    def __init__(self, marked: int) -> None:
        super().__init__(ignored=False)
        self.points = torch.cat([self.points, self.points])[:103]
        self.marked = marked

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        point, label = super().__getitem__(i)
        return point, 9 if i == self.marked else label


def ten_classes() -> nn.Module:
    return nn.Linear(6, 10)


def test_a_loss_that_one_rank_alone_sees(tmp_path: Path) -> None:
    marked = sample_of(0, 1, position=0)  # of rank 0's first micro-batch
    messages = on_ranks(
        3,
        failure,
        tmp_path,
        OneOfClassNine(marked),
        model=ten_classes(),
        task=OneInfiniteLoss(),
        val_data=None,
        changes={"best__metric": "train/loss", "best__mode": "min"},
    )
    assert len(set(messages)) == 1
    assert messages[0].startswith("the loss is not finite from step 2 (epoch 1) on")
    assert str(marked) in messages[0]


def test_samples_that_are_not_finite_are_named(tmp_path: Path) -> None:
    marked = sample_of(0, 1)
    message = failure(tmp_path, Marked(marked, value=float("nan")))
    assert f"of its samples, not finite already in the data: {marked};" in message


def test_validation_samples_that_are_not_finite(tmp_path: Path) -> None:
    class Bad(Points):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            point, label = super().__getitem__(i)
            return (point / 0 if i == 13 else point), label

    messages = on_ranks(
        2,
        failure,
        tmp_path,
        Points(ignored=False),
        val_data=Bad(40, ignored=False),
        changes={"batch__eval_size": 10},
    )
    assert len(set(messages)) == 1
    assert re.match(
        r"the validation loss is (nan|inf): it is of validation samples 13;",
        messages[0],
    )
    assert files_are_finite(tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step_00000004"


class Steep(nn.Module):
    """Finite for what is normalised, and for no large numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class Large(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e9


def of_slow_statistics(directory: Path) -> str:
    torch.manual_seed(3)
    slow = nn.BatchNorm1d(6, momentum=1e-15)
    model = nn.Sequential(Large(), slow, Steep(), nn.Linear(6, 4))
    data = Points(56, ignored=False)
    settings = config(directory, train__epochs=1, batch__micro_size=14)
    trainer = Trainer(settings, model=model, train_data=data, val_data=data)
    with pytest.raises(LockstepError) as caught:
        trainer.fit()
    assert not slow.weight.isnan().any()
    assert slow.training
    return str(caught.value)


def test_running_statistics_that_hardly_move_are_named(tmp_path: Path) -> None:
    messages = on_ranks(2, of_slow_statistics, tmp_path)
    assert len(set(messages)) == 1
    assert messages[0].startswith("the validation loss is nan: the data are not at")
    assert 'At momentum 1e-15 (layer "1")' in messages[0]
    assert "set batch_norm.momentum=0.1" in messages[0]


def test_weights_that_overflow_in_the_last_update(tmp_path: Path) -> None:
    """The loss and the gradient of the last step are finite, and the update is not."""
    changes = {
        "optimizer__lr": 1e300,
        "optimizer__weight_decay": 1e10,
        "train__max_steps": 1,
    }
    message = failure(tmp_path, Marked(None), changes=changes)
    assert "is not finite after step 1, although" in message
    assert not files_are_finite(tmp_path / "run")


def test_buffers_may_be_infinite(tmp_path: Path) -> None:
    class WithMask(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    trainer = fit(tmp_path, Marked(None), model=WithMask())
    assert trainer.progress.step == EPOCHS * STEPS


@pytest.mark.parametrize("steps", [3, 60])
def test_fp16_that_skips_every_step(tmp_path: Path, steps: int) -> None:
    """A gradient that no loss scale can hold: the run says so, after many such steps or at its end."""

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + Explode.apply(self.weight.sum())

    message = failure(
        tmp_path,
        Marked(None),
        model=Steep(),
        task="cross_entropy",
        changes={
            "train__precision": "fp16",
            "train__epochs": 20,
            "train__max_steps": steps,
        },
    )
    expected = "all 3 steps were left out" if steps == 3 else "50 steps in a row"
    assert expected in message
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1].get("skipped_steps", rows[0]["skipped_steps"]) > 0


class Explode(torch.autograd.Function):
    """0 forwards, an infinite gradient backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


# ---------------------------------------------------------------- the flags themselves


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_flags(dtype: torch.dtype, value: float) -> None:
    flags = FiniteFlags(torch.device("cpu"))
    good = [
        torch.randn(5).to(dtype),
        torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype),
    ]
    bad = torch.zeros(7, dtype=dtype)
    bad[3] = value
    copies = [tensor.clone() for tensor in good]
    losses = [torch.tensor(2.0)]
    last = 2 * CAPACITY + 3
    for step in range(1, last + 1):
        gradients = [*good, bad] if step in (2, CAPACITY, last) else good
        _, flag = flags.mark(step, losses, gradients)
        assert bool(flag) == (gradients is not good)
    result = flags.read()
    assert result.loss == []
    assert result.gradient == [2, CAPACITY, last]
    assert flags.read().first() is None
    flags.mark(1, [torch.tensor(value)], [])
    assert flags.read().loss == [1]
    assert all(torch.equal(a, b) for a, b in zip(good, copies, strict=True))


def test_flags_of_mixed_sparse_and_complex_gradients() -> None:
    flags = FiniteFlags(torch.device("cpu"))
    sparse = torch.sparse_coo_tensor(
        [[0, 2]], [1.0, torch.nan], (4,), check_invariants=True
    )
    complex_ = torch.tensor([1 + 1j, complex(0, torch.inf)])
    plain = [torch.ones(2), torch.ones(2).double()]
    for step, gradients in enumerate(
        ([*plain, sparse], [*plain, complex_], plain), start=1
    ):
        flags.mark(step, [], gradients)
    assert flags.read().gradient == [1, 2]
    names = {
        "a": torch.tensor([1e300], dtype=torch.float64),
        "b": sparse,
        "c": torch.tensor([1]),
    }
    assert first_not_finite(names) == "b"


# ---------------------------------------------------------------- train.non_finite=skip


class WithNorm(nn.Module):
    """A norm layer, whose statistics a step with NaN inputs would spoil."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def plain_loop() -> dict[str, Tensor]:
    """The same in plain PyTorch: a step whose loss is NaN is not taken, and its statistics are put back."""
    model = WithNorm().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = Marked(40, value=float("nan"))
    for step in plan().steps():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.zero_grad()
        total = 0.0
        for index in range(len(step.micro_batches)):
            samples = [data[int(i)] for i in plan().sample_ids(step, index)]
            points = torch.stack([point for point, _ in samples])
            labels = torch.tensor([label for _, label in samples])
            loss = F.cross_entropy(model(points), labels, reduction="sum") / step.size
            loss.backward()
            total += loss.item()
        if math.isfinite(total):
            optimizer.step()
        else:
            model.load_state_dict(before)
    return model.state_dict()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("reproducibility", ["standard", "bitwise"])
def test_a_step_that_is_left_out(
    tmp_path: Path, ranks: int, reproducibility: str
) -> None:
    """As in a plain loop that skips it, on any number of ranks; counted, and no row is NaN."""

    def fit() -> tuple[dict[str, Tensor], Any]:
        settings = config(
            tmp_path,
            run__reproducibility=reproducibility,
            batch__micro_size=7,
            train__epochs=EPOCHS,
            train__log_every=3,
            train__non_finite="skip",
        )
        trainer = Trainer(
            settings,
            model=WithNorm(),
            train_data=Marked(40, value=float("nan")),
            val_data=Points(40, ignored=False),
        )
        summary = trainer.fit()
        return state(trainer), summary

    expected = plain_loop()
    for weights, summary in on_ranks(ranks, fit):
        assert summary["skipped_steps"] == EPOCHS
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-12, atol=1e-12)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert all(row[key] == row[key] for row in rows for key in row)
    assert rows[-2]["skipped_steps"] == EPOCHS


def test_a_run_of_steps_left_out_ends(tmp_path: Path) -> None:
    class AllNaN(Points):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            point, label = super().__getitem__(i)
            return point * float("nan"), label

    for steps, expected in ((3, "all 3 steps"), (60, "left out 50 steps in a row")):
        changes = {
            "train__non_finite": "skip",
            "train__epochs": 20,
            "train__max_steps": steps,
            "run__resume": "never",
        }
        data = AllNaN(ignored=False)
        message = failure(
            tmp_path,
            data,
            task=None,
            val_data=None,
            changes=changes | {"best__metric": "train/loss", "best__mode": "min"},
        )
        assert expected in message
