"""Small data, nets and configs that the distributed tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import Config, Trainer
from trainer.core.proof.prove import Proof
from trainer.reporting.jsonl import read_rows
from trainer.reporting.summary import header

SAMPLES, CLASSES, IGNORED = 103, 4, -1
# Of a run's summary: equal where runs are the same bit for bit.
HASHES = ("weights_sha256", "buffers_sha256", "optimizer_sha256")


class Points:
    """`(6,)` points with labels, some of them ignored: a map-style data set."""

    classes = tuple("abcd")

    def __init__(self, samples: int = SAMPLES, ignored: bool = True) -> None:
        draw = torch.Generator().manual_seed(1)
        self.points = torch.randn(samples, 6, generator=draw, dtype=torch.float64)
        self.labels = torch.randint(CLASSES, (samples,), generator=draw)
        if ignored:
            self.labels[::5] = IGNORED

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.points[i], int(self.labels[i])


class Images(Points):
    """`(2, 5, 5)` images with labels."""

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__(samples, ignored=False)
        self.points = torch.randn(
            samples,
            2,
            5,
            5,
            generator=torch.Generator().manual_seed(2),
            dtype=torch.float64,
        )


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def conv_net(**batch_norm: Any) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, **batch_norm),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )


def config(directory: Path, **changes: Any) -> Config:
    """fp64, nothing drawn or uploaded; changes are dotted keys with `__` for the dot, None to leave one out."""
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "figures": False},
        "batch": {"size": 28},
        "loss": {},
        "optimizer": {"lr": 0.1, "momentum": 0.9},
        "schedule": {"name": "constant"},
        "train": {"precision": "fp64", "epochs": 2, "log_every": 1},
        "wandb": {"mode": "disabled"},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree.setdefault(section, {})[key] = value
        if value is None:
            del tree[section][key]
    return Config.from_dict(tree)


def bitwise_config(directory: Path, name: str, **changes: Any) -> Config:
    """The same bits on any number of processes; a second start goes on with the run."""
    settings = {
        "run__name": name,
        "run__reproducibility": "bitwise",
        "run__resume": "auto",
        "run__proof": "off",
        "batch__micro_size": 7,
    }
    return config(directory, **(settings | changes))


def fitted(settings: Config, model: nn.Module, **more: Any) -> Trainer:
    trainer = Trainer(settings, model=model, **more)
    trainer.fit()
    return trainer


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {
        name: tensor.clone() for name, tensor in trainer.module.state_dict().items()
    }


def tensors_of(model: nn.Module, loss: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights and buffers of a model and of its loss."""
    tensors = {}
    for prefix, root in (("", model), ("loss/", loss)):
        for name, tensor in root.state_dict().items():
            tensors[prefix + name] = tensor.detach().clone()
    return tensors


def rows_of(run: Path) -> list[dict[str, Any]]:
    """What a run logged, without what depends on the clock."""
    kept = []
    for row in read_rows(run / "metrics.jsonl"):
        for name in ("samples_per_second", "data_wait"):
            row.pop(name, None)
        kept.append(row)
    return kept


def header_of(trainer: Trainer, directory: Path) -> dict[str, str]:
    """The lines that a run begins with, by their titles."""
    facts = header(
        trainer.run,
        trainer.schedule,
        1,
        "",
        directory=directory,
        proof=Proof(off=""),
        optimizer=trainer.optimizer,
    )
    return dict(facts)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest |a - b| over all tensors, relative to the largest |b| of each."""
    assert a.keys() == b.keys()
    return max(
        float(
            (a[k] - b[k]).abs().max()
            # fp64 also for integers, of which 1e-300 were 0.
            / b[k].abs().max().double().clamp(min=1e-300)
        )
        for k in a
        if a[k].numel()
    )
