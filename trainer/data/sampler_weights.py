"""The weight of every training sample, from what `data.sampler` says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.sampler import KEY, SamplerSource
from trainer.errors import ConfigError, config_error, nearest

Weights = npt.NDArray[np.float64]


def sample_weights(
    source: SamplerSource, weights: Any, file: str | None, attribute: str | None
) -> Weights:
    """fp64 `(samples,)` from exactly one of: `weights` by class, a `file`, an `attribute` of the data set.

    Raises `ConfigError` unless all are finite, none is below 0, and one is above.
    """
    given = [weights is not None, file is not None, attribute is not None]
    if sum(given) != 1:
        raise ConfigError(KEY, "weighted takes one of weights, file and attribute")
    if weights is not None:
        key, values = f"{KEY}.weights", _by_class(source, weights)
    elif file is not None:
        key, values = f"{KEY}.file", read_values("file", file)
    else:
        key, values = f"{KEY}.attribute", _attribute(source, str(attribute))
    result = _as_numbers(key, values)
    if result.shape != (source.samples,):
        raise ConfigError(
            key,
            f"gives weights of shape {result.shape}, and there are {source.samples:,} training samples",
        )
    if not result.any():
        raise ConfigError(key, "gives every training sample the weight 0")
    return result


def read_values(name: str, file: Any) -> npt.NDArray[Any]:
    """The numbers in a file: NumPy's `.npy`, or text with one in each line. Raises `ConfigError` on argument `name`."""
    path = Path(str(file)).expanduser()
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        lines = path.read_text().split()
        try:
            return np.array([int(line) for line in lines])
        except ValueError:
            return np.array([float(line) for line in lines])
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise config_error(
            f"{KEY}.{name}",
            f"{path} cannot be read ({reason}); give a .npy file, or text with a number in each line",
            error,
        ) from None


def _by_class(source: SamplerSource, weights: Any) -> Weights:
    key = f"{KEY}.weights"
    labels = source.labels
    count = int(labels.max(initial=-1)) + 1
    if isinstance(weights, Mapping):
        weights = _listed(source, weights, max(count, len(source.classes or [])))
    values = _as_numbers(key, weights)
    if values.ndim != 1 or len(values) < count:
        raise ConfigError(
            key,
            f"gives {values.size} weights, and the samples' classes are 0 to {count - 1}; give one for each class",
        )
    # A label below 0 is of no class.
    return np.where(labels >= 0, values[labels], 0.0)


def _listed(source: SamplerSource, weights: Mapping[Any, Any], count: int) -> list[Any]:
    """Weights by class id, from a mapping by class name; a class that it leaves out has the weight 1."""
    names = [source.class_name(label) for label in range(count)]
    values: list[Any] = [1.0] * count
    for name, weight in weights.items():
        if isinstance(name, int) and 0 <= name < count:
            values[name] = weight
        elif str(name) in names:
            values[names.index(str(name))] = weight
        else:
            raise ConfigError(
                f"{KEY}.weights.{name}", f"no such class{nearest(str(name), names)}"
            )
    return values


def _attribute(source: SamplerSource, name: str) -> Any:
    if not hasattr(source.dataset, name):
        kind = type(source.dataset).__name__
        raise ConfigError(
            f"{KEY}.attribute",
            f'{kind} has no "{name}"{nearest(name, dir(source.dataset))}',
        )
    return getattr(source.dataset, name)


def _as_numbers(key: str, values: Any) -> Weights:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(key, "gives weights that are no numbers") from None
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        raise ConfigError(key, "gives a weight that is below 0 or not finite")
    return numbers
