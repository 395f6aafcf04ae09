"""What every peer trains: the same net from the same weights, on the same samples in the same order, with the same SGD.

An adapter gets a `Job` on each of its ranks. It builds its trainer around what the job gives, and calls `step_done`
after each update. There the peer waits while the others have their turn.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.reads import HostReads
from trainer.components.models import small_cnn
from trainer.data.datasets import ImageArrays, digits
from trainer.exact.plan import Plan, Step

# So small that rounding in fp32 stays far below what other samples or another order would change.
SGD = {"lr": 0.001, "momentum": 0.9, "weight_decay": 5e-4}
SEED = 0
END = "end"  # what a rank is sent in place of its next turn
LOG_EVERY = 50  # steps, by those that do not say otherwise by default


def mlp() -> nn.Module:
    """A net so small that a loop's own work shows: `(N, 1, 8, 8)` → `(N, 10)`."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@dataclass(frozen=True)
class Workload:
    """`cuts` micro-batches a step, on `ranks` processes. A round has `steps` steps."""

    name: str
    net: str
    batch_size: int
    cuts: int
    ranks: int
    steps: int

    @property
    def micro_size(self) -> int:
        return self.batch_size // self.cuts

    @property
    def cuts_of_rank(self) -> int:
        return self.cuts // self.ranks

    def make_model(self) -> nn.Module:
        torch.manual_seed(SEED)
        return mlp() if self.net == "mlp" else small_cnn(10)


WORKLOADS = (
    Workload("MLP, 64 samples a step", "mlp", 64, 1, 1, 100),
    Workload("small CNN, 64 = 8 × 8 samples a step", "cnn", 64, 8, 1, 10),
    Workload("the same on two processes, 4 × 8 each", "cnn", 64, 8, 2, 10),
)


@dataclass(frozen=True)
class Task:
    """What a peer is asked to run, in `directory`; lean, or as it is used."""

    workload: Workload
    as_used: bool
    total_steps: int
    directory: str


class Job:
    """`task` as the adapter on one rank sees it; `turns` is whoever says when this peer may go on."""

    def __init__(self, task: Task, rank: int, turns: Turns) -> None:
        self.workload = task.workload
        self.as_used = task.as_used
        self.rank, self.ranks = rank, task.workload.ranks
        self.total_steps = task.total_steps
        self.directory = Path(task.directory)
        self.bar_file = io.StringIO()  # what draws a bar draws it here
        self._turns = turns

    def step_done(self, model: nn.Module) -> None:
        """Call it after each update, with the model whose weights count in the end."""
        self._turns.step_done(model)

    def model_and_optimizer(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = self.workload.make_model().train()
        return model, torch.optim.SGD(model.parameters(), **SGD)

    @cached_property
    def data(self) -> ImageArrays:
        """Digits, repeated until they are enough for one epoch of `total_steps`."""
        source = digits().train
        assert isinstance(source, ImageArrays)
        samples = self.total_steps * self.workload.batch_size
        return ImageArrays(*source.batch(torch.arange(samples) % len(source)))

    @cached_property
    def plan(self) -> Plan:
        """Lockstep's own plan: all others read its samples in its order."""
        workload = self.workload
        return Plan(
            samples=len(self.data),
            batch_size=workload.batch_size,
            micro_size=workload.micro_size,
            ranks=workload.ranks,
            epochs=1,
            seed=SEED,
        )

    def micro_batches(self, step: Step) -> Sequence[Tensor]:
        """The ids of a step's micro-batches, over all ranks."""
        ids = self.plan.sample_ids(step, 0, self.workload.cuts)
        return torch.as_tensor(ids).split(self.workload.micro_size)

    def own_batches(self) -> list[list[int]]:
        """The ids of this rank's micro-batches, for a loader that is given to no one who deals them out."""
        each = self.workload.cuts_of_rank
        own = slice(self.rank * each, (self.rank + 1) * each)
        return [
            batch.tolist()
            for step in self.plan.steps()
            for batch in self.micro_batches(step)[own]
        ]

    def dealt_batches(self) -> list[list[int]]:
        """The ids of all micro-batches, so that rank r of R gets its own where batch i goes to rank i mod R."""
        each = self.workload.cuts_of_rank
        batches = []
        for step in self.plan.steps():
            ids = self.micro_batches(step)
            for index in range(each):
                batches += [ids[rank * each + index] for rank in range(self.ranks)]
        return [batch.tolist() for batch in batches]

    def dataset(self, *, as_dict: bool = False) -> Dataset[Any]:
        return Images(self.data, as_dict=as_dict)

    def loader(self, *, dealt: bool = False) -> DataLoader[Any]:
        batches = self.dealt_batches() if dealt else self.own_batches()
        return DataLoader(
            self.dataset(), batch_sampler=FixedBatches(batches), collate_fn=as_is
        )


class Images(Dataset[Any]):
    """Float images in [0, 1] and targets, a micro-batch by one look-up, which is the best a `DataLoader` can do."""

    def __init__(self, data: ImageArrays, *, as_dict: bool) -> None:
        self._data, self._as_dict = data, as_dict

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, ids: list[int]) -> Any:
        images, targets = self._data.batch(torch.tensor(ids))
        inputs = images.float().div_(255)
        return (
            {"inputs": inputs, "labels": targets}
            if self._as_dict
            else (inputs, targets)
        )


class FixedBatches(Sampler[list[int]]):
    """Batches that are known beforehand."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def as_is(batch: Any) -> Any:
    """A `collate_fn` for batches that come whole."""
    return batch


class Turns:
    """One rank's side of the rounds: it trains when told to, says how long that took, and waits.

    The first turn begins with the first `step_done`: what a peer does before it, and the first step itself, is in none.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._left = 1
        self._began = (0.0, 0.0)
        self._reads: HostReads | None = None

    def step_done(self, model: nn.Module) -> None:
        self._left -= 1
        if self._left == 0:
            self._wait(model)

    def _wait(self, model: nn.Module) -> None:
        """Say what the turn came to, and wait for the next one."""
        now = time.perf_counter(), time.process_time()
        if self._reads is not None:
            self._reads.__exit__(None, None, None)
        spent = [end - begin for end, begin in zip(now, self._began, strict=True)]
        self._connection.send(self._reads.count if self._reads else spent)
        request = self._connection.recv()
        if request == END:
            self._connection.send(weights(model))
            # No trainer gets the chance to save or to evaluate.
            os._exit(0)
        self._left, is_counted = request
        self._reads = HostReads() if is_counted else None
        if self._reads is not None:
            self._reads.__enter__()
        self._began = time.perf_counter(), time.process_time()


def weights(model: nn.Module) -> npt.NDArray[np.float32]:
    """All parameters in one array, in the order that the net defines."""
    parameters = [each.detach().reshape(-1) for each in model.parameters()]
    return torch.cat(parameters).numpy()
