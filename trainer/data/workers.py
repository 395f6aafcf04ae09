"""Micro-batches loaded in processes of their own, in order."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainer.data.batches import MicroBatch, Request
from trainer.data.samples import KeyedDataset
from trainer.data.worker_failure import WorkerNotes, without_sigchld_handler
from trainer.errors import DataError
from trainer.process.loader_start import (
    copy_failure,
    is_copy_failure,
    is_copyable,
    server_failure,
)
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

    Raises `LockstepError` if one of them ends, or if they run out of shared memory or file handles, and `ConfigError`
    for a data set that cannot be sent to them.
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
                batches = _start(loader, dataset)
                # Those that have ended are no longer listed later.
                processes = list(set(multiprocessing.active_children()) - others)
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError) as error:
            failure = notes.failure(error, processes, dataset.name)
            if failure is None:
                raise
            raise failure from None
        yield batch


def _start(loader: DataLoader[Any], dataset: KeyedDataset) -> Iterator[Any]:
    try:
        with (
            without_sigchld_handler(),
            starting_loader_processes(),
            warnings.catch_warnings(),
        ):
            # PyTorch's own words for what is raised next.
            warnings.filterwarnings("ignore", "Got pickle error")
            return iter(loader)
    except (EOFError, ConnectionError):
        raise server_failure() from None
    except Exception as error:
        if not is_copy_failure(error):
            raise
        raise copy_failure(error, _not_copyable(dataset)) from None


def _not_copyable(dataset: KeyedDataset) -> str:
    """What a message calls the part of a data set that pickle cannot copy."""
    if not is_copyable(dataset.dataset):
        return f"the {dataset.label} data set ({type(dataset.dataset).__name__})"
    if not is_copyable(dataset.collation):
        return "the function of data.collate"
    return dataset.transforms_key


def _return_as_is(batch: Any) -> Any:
    return batch


def _init_worker(notes: WorkerNotes, worker: int) -> None:
    begin_loader_process()
    torch.set_num_threads(1)
    notes.begin_in_worker(worker)
