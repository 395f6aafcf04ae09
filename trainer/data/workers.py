"""Micro-batches loaded in processes of their own, in order."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainer.data.batches import MicroBatch, Request
from trainer.data.samples import KeyedDataset
from trainer.data.worker_failure import WorkerNotes, without_sigchld_handler
from trainer.errors import DataError, LockstepError
from trainer.process.loader_worker import (
    begin_loader_process,
    starting_loader_processes,
)


class WorkerLoader(DataLoader[Any]):
    """A PyTorch loader that does not warn of more processes than processors: each rank would, for each set.

    `trainer.core.loader_limits` says it once.
    """

    def check_worker_number_rationality(self) -> None:
        pass


def load_in_workers(
    dataset: KeyedDataset,
    requests: Iterable[Request],
    *,
    workers: int,
    prefetch: int,
    pin_memory: bool,
) -> Iterator[MicroBatch | DataError]:
    """What `dataset` gives for each request, loaded ahead by processes that run until the last or until this is closed.

    Raises `LockstepError` if one of them ends, or if they run out of shared memory or file handles.
    """
    loader = WorkerLoader(
        dataset,
        sampler=requests,
        batch_size=None,
        collate_fn=_return_as_is,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin_memory,
        # For the workers' seeds, which would come from the run's generator.
        generator=torch.Generator(),
    )
    return iterate(loader, dataset)


def iterate(loader: DataLoader[Any], dataset: KeyedDataset) -> Iterator[Any]:
    """What a PyTorch `loader` of `dataset` with loader processes gives; errors as of `load_in_workers`."""
    notes = WorkerNotes(loader.num_workers)
    loader.worker_init_fn = partial(_init_worker, notes)
    others = set(multiprocessing.active_children())
    processes: list[Any] = []
    batches: Iterator[Any] | None = None
    while True:
        try:
            if batches is None:
                with without_sigchld_handler(), starting_loader_processes():
                    batches = iter(loader)
                # Those that have ended are no longer listed later.
                processes = list(set(multiprocessing.active_children()) - others)
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            failure = notes.failure(error, processes, dataset.name)
            if failure is None and batches is None and isinstance(error, EOFError):
                failure = LockstepError(
                    "the process that starts loader processes was killed while it started one; start the run again, "
                    "with run.resume=auto"
                )
            if failure is None:
                raise
            raise failure from None
        yield batch


def _return_as_is(batch: Any) -> Any:
    return batch


def _init_worker(notes: WorkerNotes, worker: int) -> None:
    begin_loader_process()
    torch.set_num_threads(1)
    notes.begin_in_worker(worker)
