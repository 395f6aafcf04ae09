"""`data.on_device`, before anything is trained: may the sets lie on the device, and is there room for them?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from torch import Tensor

from trainer.data.conversion import describe
from trainer.data.loading import Loader
from trainer.data.on_device import KEY
from trainer.errors import ConfigError, DataError
from trainer.process.device import device_name
from trainer.process.free_memory import describe_bytes, free_memory

TRIED = 8  # samples of a set that are watched for random draws


def check_first_batch(
    train: Loader, evaluated: Mapping[str, Loader], processes: int
) -> str:
    """What lies on the device and how much memory it takes, for the run's header; "" where nothing does.

    `processes` of this machine share the memory of its CPU.

    Raises `ConfigError` for sets that cannot lie there (`data.on_device`), and for targets that `data.batch_transforms`
    would have to move with the images.
    """
    if train.batch_transforms is not None:
        train.batch_transforms.check_targets(train.fetch([train.first_id]).targets)
    if train.device_set is None:
        return ""
    if train.dataset.arrays is None:
        _refuse_draws(train)  # an evaluation draws the same every time
    loaders = [train, *evaluated.values()]
    samples = sum(len(loader.dataset.dataset) for loader in loaders)
    sizes = [_bytes_on_device(loader) for loader in loaders]
    size = sum(sizes)
    device = train.device
    needed = size
    if device.type == "cpu":
        # What is in memory already is not copied.
        copied = [loader.dataset.arrays is None for loader in loaders]
        needed = processes * sum(itertools.compress(sizes, copied))
    free = free_memory(device)
    if free is not None and needed > free:
        raise ConfigError(
            KEY,
            f"the {samples:,} samples need {describe_bytes(needed)}, and {device_name(device)} has "
            f"{describe_bytes(free)} left; leave it out, or let data.train_transforms make smaller images",
        )
    return f"{samples:,} samples, {describe_bytes(size)} in each process"


def _bytes_on_device(loader: Loader) -> int:
    """What the samples of a loader's set take on the device, by the first of them."""
    dataset = loader.dataset
    if dataset.collation is not None:
        raise ConfigError(
            KEY,
            f"batches are look-ups on the device, and data.collate={dataset.collation.name} makes them on the host; "
            f"leave one of them out",
        )
    batch = loader.fetch([loader.first_id])
    size = 0
    for part, value in (("inputs", batch.inputs), ("targets", batch.targets)):
        if not isinstance(value, Tensor):
            raise ConfigError(
                KEY,
                f"keeps one tensor and one target for each sample, and the {part} of {dataset.label} are "
                f"{describe(value)}; leave it out",
            )
        size += value.nbytes
    return size * len(dataset.dataset)


def _refuse_draws(loader: Loader) -> None:
    """Raise `ConfigError` if fetching a sample draws random numbers: it would be the same in every epoch."""
    dataset = loader.dataset
    count = len(dataset.dataset)
    ids = {count * i // TRIED for i in range(TRIED)} | {loader.first_id}
    for sample_id in sorted(ids):
        try:
            draws = loader.draws_for(sample_id)
        except DataError:
            if not dataset.leaves_out:
                raise
            continue  # it will be left out
        if draws:
            raise ConfigError(
                KEY,
                f"reads every sample once, and {dataset.transforms_key} or the data set draws random numbers for each "
                f"sample; name random transforms in data.batch_transforms, which draw anew in every epoch",
            )
