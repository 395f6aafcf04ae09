"""Accelerate's documented loop and Lockstep's `fit`, each on 1, 2 and 4 processes, watched by the same means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.processes import on_processes
from trainer import Config, Observer, Run, Trainer
from trainer.components.models import small_cnn
from trainer.data.datasets import ImageArrays, digits

BATCH, MICRO, LR = 64, 16, 0.05


class Read:
    """Digits that note which samples are read."""

    def __init__(self, samples: int) -> None:
        train = digits().train
        self.data = ImageArrays(*train.batch(torch.arange(samples)))  # type: ignore[attr-defined]
        self.ids: list[int] = []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.ids.append(index)
        image, target = self.data[index]
        return image.float() / 255, target


class Watch:
    """What one process does: sizes of its micro-batches, and each update's learning rate and gradient."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, due: int
    ) -> None:
        self.sizes: list[int] = []  # of the micro-batches
        self.ends: list[int] = []  # micro-batches run by the end of each update
        self.rates: list[float] = []
        # Weights and gradient, `due` updates in.
        self.last: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        self._model, self._due = model, due
        model.register_forward_pre_hook(
            lambda module, inputs: self._forward(module, inputs[0])
        )
        optimizer.register_step_pre_hook(lambda optimizer, *_: self._update(optimizer))

    def _forward(self, module: nn.Module, inputs: Tensor) -> None:
        if module.training:
            self.sizes.append(len(inputs))

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        self.ends.append(len(self.sizes))
        self.rates.append(optimizer.param_groups[0]["lr"])
        if len(self.ends) == self._due:
            named = dict(self._model.named_parameters())
            gradients = {
                name: p.grad.clone() for name, p in named.items() if p.grad is not None
            }
            self.last = (
                {name: p.detach().clone() for name, p in named.items()},
                gradients,
            )


@dataclass(frozen=True)
class Seen:
    """What a process brings home. `updates`: sample ids of each micro-batch of each update."""

    updates: list[list[list[int]]]
    rates: list[float]
    last: tuple[dict[str, Tensor], dict[str, Tensor]]
    end: dict[str, Tensor]


class FromTheStart(Observer):
    """Forgets what was run and read before the first step, to try the model and its data."""

    def __init__(self, watch: Watch, data: Read) -> None:
        self._watch = watch
        self._data = data

    def begin(self, run: Run) -> None:
        self._watch.sizes.clear()
        self._data.ids.clear()


def trained(loop: str, processes: int, samples: int, epochs: int) -> list[Seen]:
    with TemporaryDirectory() as directory:
        return on_processes(
            processes, LOOPS[loop], Path(directory), processes, samples, epochs
        )


def _start() -> nn.Module:
    torch.manual_seed(0)
    return small_cnn(10)


def guide(directory: Path, processes: int, samples: int, epochs: int) -> Seen:
    """Gradient accumulation as Accelerate's guide has it, everything prepared, a learning rate schedule with it."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        gradient_accumulation_steps=BATCH // (MICRO * processes), cpu=True
    )
    data, module = Read(samples), _start()
    sgd = torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9)
    steps = -(-samples // BATCH)
    decay = torch.optim.lr_scheduler.StepLR(sgd, step_size=steps, gamma=0.1)
    batches: Any = DataLoader(data, batch_size=MICRO, shuffle=True)  # type: ignore[arg-type]
    watch = Watch(module, sgd, steps)
    model, optimizer, batches, scheduler = accelerator.prepare(
        module, sgd, batches, decay
    )
    model.train()
    for _ in range(epochs):
        for images, targets in batches:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), targets)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return _seen(watch, data, module)


def ours(
    directory: Path,
    processes: int,
    samples: int,
    epochs: int,
    reproducibility: str = "standard",
) -> Seen:
    """The same by Lockstep, which reads the data in the batches that its plan makes."""
    config = Config.from_dict(
        {
            "run": {
                "dir": str(directory),
                "figures": False,
                "reproducibility": reproducibility,
            },
            "batch": {"size": BATCH, "micro_size": MICRO},
            "optimizer": {"lr": LR, "momentum": 0.9},
            "schedule": {
                "name": "step",
                "per": "step",
                "step_size": -(-samples // BATCH),
                "gamma": 0.1,
            },
            "train": {"epochs": epochs},
            "best": {"metric": "train/loss"},
            "wandb": {"mode": "disabled"},
        }
    )
    data = Read(samples)
    trainer = Trainer(config, model=_start(), train_data=data)
    watch = Watch(trainer.module, trainer.optimizer, trainer.plan.steps_per_epoch)
    trainer.observers.add(FromTheStart(watch, data))
    trainer.fit()
    return _seen(watch, data, trainer.module)


LOOPS: dict[str, Callable[..., Seen]] = {
    "Accelerate's guide": guide,
    "Lockstep": ours,
    "Lockstep, bitwise": partial(ours, reproducibility="bitwise"),
}


def _seen(watch: Watch, data: Read, module: nn.Module) -> Seen:
    micro_batches = [
        part.tolist() for part in torch.split(torch.tensor(data.ids), watch.sizes)
    ]
    starts = [0, *watch.ends[:-1]]
    updates = [
        micro_batches[start:end] for start, end in zip(starts, watch.ends, strict=True)
    ]
    return Seen(updates, watch.rates, watch.last, module.state_dict())


@dataclass(frozen=True)
class Line:
    """A line of the table: one loop on some processes, held against itself on one."""

    loop: str
    layout: str  # processes × micro-batches that each accumulates
    read: list[int]  # samples read in each epoch
    repeated: list[int]  # of those, the ones that the epoch had had already
    other_steps: str  # updates made of other samples than on one process
    gradient_error: float  # of the first epoch's last update
    rates: list[float]  # of each epoch's last update
    batch_norm_updates: int
    weights_moved: float  # the largest difference from one process's weights at the end
    accuracy: float


def compare(samples: int, epochs: int, counts: Sequence[int]) -> list[Line]:
    lines = []
    for loop in LOOPS:
        alone: list[Seen] = []
        for processes in counts:
            seen = trained(loop, processes, samples, epochs)
            lines.append(_line(loop, seen, alone := alone or seen, epochs))
    return lines


def _line(loop: str, seen: Sequence[Seen], alone: Sequence[Seen], epochs: int) -> Line:
    updates, reference = _updates(seen), _updates(alone)
    an_epoch = len(updates) // epochs
    read = [_ids(updates[an_epoch * e : an_epoch * (e + 1)]) for e in range(epochs)]
    others = sum(
        sorted(_ids([a])) != sorted(_ids([b]))
        for a, b in zip(updates, reference, strict=True)
    )
    weights = {name for name, _ in small_cnn(10).named_parameters()}
    end, end_alone = seen[0].end, alone[0].end
    return Line(
        loop,
        f"{len(seen)} × {BATCH // MICRO // len(seen)}",
        [len(ids) for ids in read],
        [len(ids) - len(set(ids)) for ids in read],
        f"{others} of {len(updates)}",
        gradient_error(
            seen[0].last, updates[an_epoch - 1], set(_ids(updates[: an_epoch - 1]))
        ),
        [seen[0].rates[an_epoch * (e + 1) - 1] for e in range(epochs)],
        int(end["1.num_batches_tracked"]),
        max(float((end[name] - end_alone[name]).abs().max()) for name in weights),
        accuracy(end),
    )


def _updates(seen: Sequence[Seen]) -> list[list[list[int]]]:
    """The micro-batches of each update, over all processes."""
    return [
        [part for parts in update for part in parts]
        for update in zip(*(s.updates for s in seen), strict=True)
    ]


def _ids(updates: Sequence[list[list[int]]]) -> list[int]:
    return [i for update in updates for part in update for i in part]


def gradient_error(
    held: tuple[dict[str, Tensor], dict[str, Tensor]],
    update: list[list[int]],
    had: set[int],
) -> float:
    """How far an update's gradient is from the mean over those of its samples that the epoch had not had before.

    Relative, in L2; the mean is computed in fp64 at the same weights, normalised over the same micro-batches.
    """
    weights, gradient = held
    model, data = small_cnn(10).double(), digits().train
    model.load_state_dict(
        {name: tensor.double() for name, tensor in weights.items()}, strict=False
    )
    fresh = [new for part in update if (new := [i for i in part if i not in had])]
    samples = sum(map(len, fresh))
    for part in fresh:
        images, targets = data.batch(part)  # type: ignore[attr-defined]
        loss = (
            F.cross_entropy(model(images.double() / 255), targets, reduction="sum")
            / samples
        )
        loss.backward()  # type: ignore[no-untyped-call]
    exact = torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )
    got = torch.cat(
        [gradient[name].flatten() for name, _ in model.named_parameters()]
    ).double()
    return float((got - exact).norm() / exact.norm())


def accuracy(state: dict[str, Tensor]) -> float:
    model, data = small_cnn(10).eval(), digits().val
    assert isinstance(data, ImageArrays)
    model.load_state_dict(state)
    with torch.no_grad():
        return float(
            (model(data.images.float() / 255).argmax(1) == data.targets).float().mean()
        )
