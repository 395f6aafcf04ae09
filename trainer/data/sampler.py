"""What a sampler is made of: the data it draws from, the order it gives, and the checks of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from trainer.data.datasets import MapDataset
from trainer.data.labels import Labels, find_labels
from trainer.errors import ConfigError
from trainer.exact.plan import Ids

KEY = "data.sampler"
# Of an epoch, whose ids are in memory: 16 GiB of them.
MOST_SAMPLES = 2**31


class SamplerSource:
    """The training data that a sampler draws from, and the run's seed."""

    def __init__(
        self, dataset: MapDataset, classes: Sequence[str] | None, seed: int
    ) -> None:
        self.dataset = dataset
        self.classes = classes
        self.seed = seed
        self.samples = len(dataset)

    @cached_property
    def labels(self) -> Labels:
        """The class id of every sample, read-only; one below 0 is of no class.

        Raises `ConfigError` where they are not known without reading samples.
        """
        labels = find_labels(self.dataset)
        if labels is None:
            raise ConfigError(
                f"{KEY}.name",
                f"needs the class of every sample, and {type(self.dataset).__name__} does not tell it without reading "
                f"them; give the data set an attribute `targets`, a list of {self.samples:,} class ids",
            )
        # A function that sorted them in place would change them for every later epoch.
        labels.flags.writeable = False
        return labels

    def class_name(self, label: int) -> str:
        """What a message calls a class."""
        if self.classes is not None and 0 <= label < len(self.classes):
            return self.classes[label]
        return f"class {label}"


class DrawnOrder:
    """An order of `samples` ids in every epoch, drawn by `draw(epoch)`. `description` is for the run's header."""

    is_own_code = False  # of the user's, which may differ from rank to rank

    def __init__(
        self, samples: int, draw: Callable[[int], Ids], description: str
    ) -> None:
        if samples > MOST_SAMPLES:
            raise ConfigError(
                KEY,
                f"an epoch of {samples:,} samples is more than the {MOST_SAMPLES:,} whose order memory can hold; make "
                f"it shorter, with more of train.epochs",
            )
        self.samples = samples
        self._draw = draw
        self.description = description

    def ids(self, epoch: int) -> Ids:
        return self._draw(epoch)


def check_ids(key: str, subject: str, values: Any, samples: int) -> Ids:
    """`values` as sample ids. Raises `ConfigError`, which begins with `subject`, for what are none."""
    ids = np.asarray(values)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        kind = f"{ids.dtype} {ids.shape}" if ids.dtype != object else type(values)
        raise ConfigError(key, f"{subject} {kind}, and sample ids are whole numbers")
    if not ids.size:
        raise ConfigError(key, f"{subject} no samples")
    wrong = ids[(ids < 0) | (ids >= samples)]
    if wrong.size:
        raise ConfigError(
            key,
            f"{subject} the id {wrong[0]}, and the {samples:,} training samples are 0 to {samples - 1:,}",
        )
    return ids.astype(np.int64)


def check_count(name: str, value: Any, most: int | None = None) -> int:
    """`value` as a count from 1 to `most`. Raises `ConfigError` on the argument `name` of the sampler."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < 1 or (most is not None and value > most):
        bound = "of at least 1" if most is None else f"from 1 to {most:,}"
        raise ConfigError(f"{KEY}.{name}", f"{value} is not a whole number {bound}")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """`value` as true or false. Raises `ConfigError` on the argument `name` of the sampler."""
    if not isinstance(value, bool):
        raise ConfigError(f"{KEY}.{name}", f"{value} is neither true nor false")
    return value
