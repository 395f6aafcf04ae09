"""run.reproducibility=bitwise: the same bits on any number of ranks, with any workers, through any stop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.transforms.v2  # noqa: F401 - imported once, before the ranks are forked
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, largest_difference, state
from trainer import LockstepError, Trainer
from trainer.core.metrics import TIMINGS
from trainer.exact.exchange import ShardExchange
from trainer.process.ranks import Ranks
from trainer.reporting.jsonl import read_rows

DIGESTS = ("weights_sha256", "buffers_sha256", "optimizer_sha256")


class Net(nn.Module):
    """BatchNorm, dropout, and a head that only some micro-batches use."""

    def __init__(self, sometimes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.head, self.extra = (
            nn.Dropout(0.2),
            nn.Linear(128, 5),
            nn.Linear(128, 5),
        )
        self.sometimes = sometimes

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(
            nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2).flatten(1)
        )
        out: Tensor = self.head(x)
        return (
            out if self.sometimes and x[0].sum() > x[-1].sum() else out + self.extra(x)
        )


class DeepNet(nn.Sequential):
    """Convolutions whose gradients make up most of the norm."""

    def __init__(self) -> None:
        torch.manual_seed(6)
        super().__init__(
            nn.Conv2d(3, 24, 3),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 40, 3),
            nn.ReLU(),
            nn.Conv2d(40, 5, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def run(
    directory: Path,
    *,
    threads: int = 1,
    sometimes: bool = False,
    model: type[nn.Module] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    changes = {"train__log_every": 3, "train__max_grad_norm": 1.0} | changes
    settings = config(
        directory,
        run__reproducibility="bitwise",
        run__resume="auto",
        run__proof="off",
        train__precision="fp32",
        data__name="fake",
        data__size=86,
        data__val_size=50,
        data__image_size=8,
        data__num_classes=5,
        data__train_transforms=[
            {"name": "RandomHorizontalFlip"},
            {"name": "RandomCrop", "size": 8, "padding": 1},
        ],
        batch__micro_size=3,
        batch__eval_size=9,
        optimizer__weight_decay=1e-3,
        train__find_unused_parameters=sometimes,
        **changes,
    )
    trainer = Trainer(settings, model=Net(sometimes) if model is None else model())
    summary = trainer.fit()
    rows = [
        {k: repr(v) for k, v in r.items() if k not in TIMINGS}
        for r in read_rows(directory / "run" / "metrics.jsonl")
    ]
    return {"digests": [summary[name] for name in DIGESTS], "rows": rows}


VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {
        "optimizer__name": "torch.optim.AdamW",
        "optimizer__momentum": None,
        "batch_norm__momentum_per": "step",
    },
    "weighted": {
        "loss__class_weights": [1.0, 0.3, 2.0, 0.5, 1.5],
        "loss__label_smoothing": 0.1,
    },
    "sometimes": {"sometimes": True},
    "recalibrated": {"batch_norm__recalibrate": 2},
    # A norm adds up in memory order, so a gradient must come back from the exchange in the parameter's own.
    "channels_last": {
        "train__channels_last": True,
        "model": DeepNet,
        "train__max_grad_norm": 0.05,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_on_any_number_of_ranks(tmp_path: Path, variant: str) -> None:
    """M = 10, and 1 in a last step of 2 samples, on 1 to 8 ranks, with 0 to 2 workers and 1 or 2 threads."""
    (reference,) = on_ranks(1, run, tmp_path / "1", **VARIANTS[variant])
    cases = (
        [(2, 1, 2), (5, 0, 1)]
        if variant != "sgd"
        else [(1, 2, 2), (3, 1, 2), (4, 2, 1), (8, 0, 1)]
    )
    for ranks, workers, threads in cases:
        directory = tmp_path / f"{ranks}-{workers}"
        results = on_ranks(
            ranks,
            run,
            directory,
            data__workers=workers,
            threads=threads,
            **VARIANTS[variant],
        )
        assert results[0] == reference
        assert all(result["digests"] == reference["digests"] for result in results)


def run_on_machines(a_machine: int, directory: Path) -> tuple[dict[str, Any], int]:
    """A run whose ranks believe to be on several machines, and how many levels its exchange has."""
    levels = []

    def machines(ranks: Ranks) -> list[str]:
        return [f"node{rank // a_machine}" for rank in range(ranks.count)]

    def exchange_sum(exchange: ShardExchange, *args: Any) -> list[Tensor]:
        levels.append(len(exchange._ranks.levels))
        return whole_sum(exchange, *args)

    whole_sum = ShardExchange.sum
    # This process belongs to the test alone.
    Ranks.machines = property(machines)  # type: ignore[assignment,method-assign]
    ShardExchange.sum = exchange_sum  # type: ignore[method-assign]
    return run(directory), max(levels)


@pytest.mark.parametrize(("machines", "a_machine"), [(2, 2), (3, 2)])
def test_the_same_bits_on_several_machines(
    tmp_path: Path, machines: int, a_machine: int
) -> None:
    """The last step leaves all ranks of all machines but one idle."""
    (reference,) = on_ranks(1, run, tmp_path / "1")
    results = on_ranks(
        machines * a_machine, run_on_machines, a_machine, tmp_path / "many"
    )
    assert results[0] == (reference, 2)
    for result, _ in results:
        assert result["digests"] == reference["digests"]


@pytest.mark.parametrize("stops", [[(2, 5)], [(1, 2), (4, 3), (8, 7)]])
def test_the_same_bits_through_any_stop(
    tmp_path: Path, stops: list[tuple[int, int]]
) -> None:
    (reference,) = on_ranks(1, run, tmp_path / "straight")
    for ranks, step in stops:
        on_ranks(ranks, run, tmp_path / "cut", train__max_steps=step)
    assert on_ranks(3, run, tmp_path / "cut")[0] == reference


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
def test_compiled_models_too(tmp_path: Path) -> None:
    """Micro-batches of two sizes, met in another order on each number of ranks, and recalibrated by many of them."""
    changes: dict[str, Any] = {
        "train__compile": True,
        "train__max_steps": 5,
        "batch_norm__recalibrate": 3,
    }
    (reference,) = on_ranks(1, run, tmp_path / "1", **changes)
    # Each rank compiles for itself, which takes 3 s of a core.
    assert on_ranks(2, run, tmp_path / "2", **changes)[0] == reference


def test_bitwise_and_standard_are_the_same_mathematics(tmp_path: Path) -> None:
    def weights(directory: Path, reproducibility: str) -> dict[str, Tensor]:
        settings = config(
            directory,
            run__reproducibility=reproducibility,
            batch__micro_size=3,
            loss__class_weights=[1, 2, 3, 4],
        )
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 4),
        )
        trainer = Trainer(
            settings, model=net, train_data=Images(86), val_data=Images(20)
        )
        trainer.fit()
        return state(trainer)

    (standard,) = on_ranks(1, weights, tmp_path / "standard", "standard")
    for ranks in (1, 3):
        for bitwise in on_ranks(ranks, weights, tmp_path / str(ranks), "bitwise"):
            assert largest_difference(bitwise, standard) < 1e-12


class Puts(nn.Linear):
    """Uses an operation without a deterministic kernel."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x.flatten(1))
        out.detach().clone().put_(
            torch.tensor([0, 0]), torch.tensor([1.0, 2.0], dtype=out.dtype)
        )
        return out


def test_an_operation_without_a_deterministic_kernel_is_named(tmp_path: Path) -> None:
    def message(directory: Path) -> str:
        settings = config(directory, run__reproducibility="bitwise")
        with pytest.raises(LockstepError) as caught:
            Trainer(
                settings, model=Puts(50, 4), train_data=Images(28), val_data=Images(28)
            ).fit()
        return str(caught.value)

    (text,) = on_ranks(1, message, tmp_path)
    assert text.startswith("put_ has no deterministic kernel")
    assert "run.reproducibility=standard" in text
