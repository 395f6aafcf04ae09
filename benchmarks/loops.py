"""The loops that Lockstep's is held against. Each is a generator that yields after each optimizer update.

All of them train the same model on the same data in memory with the same SGD, a micro-batch fetched by one
look-up of its ids. Those built on a `DataLoader` use one that fetches so too, which is the best it can do.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import Loop
from trainer.data.datasets import ImageArrays
from trainer.exact.plan import split_evenly
from trainer.process.ranks import Ranks


@dataclass(frozen=True)
class Work:
    """What is trained, and where. `sgd` holds the optimizer's arguments, `autocast` a dtype or None.

    `channels_last` and `compiled` are of the model.
    """

    make_model: Callable[[], nn.Module]
    data: ImageArrays
    batch_size: int
    micro_size: int
    sgd: dict[str, Any]
    ranks: Ranks
    autocast: torch.dtype | None = None
    channels_last: bool = False
    compiled: bool = False

    @property
    def cuts(self) -> int:
        return self.batch_size // self.micro_size

    def model_and_optimizer(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = self.make_model().to(self.ranks.device).train()
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compiled:
            model.compile()
        return model, torch.optim.SGD(model.parameters(), **self.sgd)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and targets, on the device."""
        inputs, targets = (
            self.data.images.index_select(0, ids),
            self.data.targets.index_select(0, ids),
        )
        if self.ranks.device.type == "cuda":
            inputs = inputs.pin_memory().to(self.ranks.device, non_blocking=True)
            targets = targets.pin_memory().to(self.ranks.device, non_blocking=True)
        return inputs.float().div_(255), targets

    def loader(self) -> DataLoader[Any]:
        """A shuffled `DataLoader` of micro-batches."""
        return DataLoader(
            _InMemory(self.data), self.micro_size, shuffle=True, collate_fn=_as_is
        )


class _InMemory(Dataset[Any]):
    def __init__(self, data: ImageArrays) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        return self._data.batch(ids)


def _as_is(batch: Any) -> Any:
    return batch


def raw(work: Work) -> Loop:
    """The leanest loop that does the work: nothing is logged, kept or looked at."""
    yield from _by_hand(work, lambda loss: None)


def raw_with_tqdm(work: Work) -> Loop:
    """The same with what people add to it: a tqdm bar, refreshed every step with the loss."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(file=io.StringIO()) as bar:

        def show(loss: Tensor) -> None:
            bar.set_postfix(loss=loss.item() * work.cuts)
            bar.update()

        yield from _by_hand(work, show)


def _by_hand(work: Work, show: Callable[[Tensor], None]) -> Loop:
    model, optimizer = work.model_and_optimizer()
    autocast = (
        nullcontext()
        if work.autocast is None
        else torch.autocast(work.ranks.device.type, work.autocast)
    )
    size, micro, cuts = work.batch_size, work.micro_size, work.cuts
    while True:
        order = torch.randperm(len(work.data))
        for start in range(0, len(order) - size + 1, size):
            for first in range(start, start + size, micro):
                inputs, targets = work.fetch(order[first : first + micro])
                with autocast:
                    loss = F.cross_entropy(model(inputs), targets)
                if cuts > 1:
                    loss = loss / cuts
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            show(loss)
            yield


def raw_ddp(work: Work) -> Loop:
    """The leanest loop on several processes: DDP, set up as Lockstep's, gradients exchanged once a step."""
    model, optimizer = work.model_and_optimizer()
    ddp: Any = work.ranks.prepare(model)
    first, last = split_evenly(work.cuts, work.ranks.count)[work.ranks.rank]
    own = torch.split(torch.arange(work.batch_size), work.micro_size)[first:last]
    draw = torch.Generator().manual_seed(0)  # the same order on every process
    while True:
        order = torch.randperm(len(work.data), generator=draw)
        for start in range(0, len(order) - work.batch_size + 1, work.batch_size):
            for index, places in enumerate(own, start=1):
                inputs, targets = work.fetch(order[start + places])
                with nullcontext() if index == len(own) else ddp.no_sync():
                    loss = F.cross_entropy(ddp(inputs), targets) * (
                        work.ranks.count / work.cuts
                    )
                    loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            yield


def accelerate(work: Work) -> Loop:
    """The loop of Accelerate's guide to gradient accumulation, everything prepared."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        gradient_accumulation_steps=work.cuts,
        cpu=True if work.ranks.device.type == "cpu" else None,
    )
    model, optimizer = work.model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1_000_000)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, work.loader(), scheduler
    )
    while True:
        for images, targets in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images.float().div_(255)), targets)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                yield


def fabric(work: Work) -> Loop:
    """The loop of Lightning Fabric's guide to gradient accumulation, everything set up."""
    from lightning.fabric import Fabric  # type: ignore[import-not-found]

    lightning = Fabric(accelerator=work.ranks.device.type, devices=1)
    model, optimizer = lightning.setup(*work.model_and_optimizer())
    loader = lightning.setup_dataloaders(work.loader())
    while True:
        for index, (images, targets) in enumerate(loader, start=1):
            accumulating = index % work.cuts != 0
            with lightning.no_backward_sync(model, enabled=accumulating):
                loss = F.cross_entropy(model(images.float().div_(255)), targets)
                lightning.backward(loss / work.cuts)
            if not accumulating:
                optimizer.step()
                optimizer.zero_grad()
                yield
