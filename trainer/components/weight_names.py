"""Which tensor of a file is which of a model: prefixes that wrappers put before names, dropped or added.

`module.` is of DataParallel and DDP, `_orig_mod.` of torch.compile, `model.` or `net.` of a Lightning module; any other
is found alike, by the names and shapes that fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from trainer.errors import ConfigError, nearest

Tensors = Mapping[str, Tensor]
COMPILED = "_orig_mod."


class Match(NamedTuple):
    """Tensors under the model's names, where in the file they were, and how many fit the model by name and shape."""

    tensors: Tensors
    key: str  # dotted: a key of the file, then a prefix of names that was dropped
    note: str
    fitting: int


def match_names(
    candidates: Mapping[str, Tensors], own: Tensors, path: str, key: str | None
) -> Match:
    """The state dict of a file that fits the model best, under the model's names.

    `candidates` are the file's state dicts; `key` is `model.weights_key`. Raises `ConfigError` where several fit alike,
    such as weights and their moving average, unless `key` names one.
    """
    matches: list[Match] = []
    for name, tensors in candidates.items():
        # A prefix that is asked for need not be the one that fits best.
        matches += _readings(name, tensors, own, best_only=key is None)
    if key is not None:
        return _chosen(matches, path, key)
    best = max(match.fitting for match in matches)
    equals = [match for match in matches if match.fitting == best]
    # A file that does not fit at all is told of as such, not as several.
    fits = 2 * best >= len(own)
    if len(equals) > 1 and fits:
        keys = ", ".join(match.key or "(the names as they are)" for match in equals)
        raise ConfigError(
            "model.weights",
            f"{path} holds several sets of these weights: {keys}; set model.weights_key to one of them",
        )
    return equals[0]


def _chosen(matches: list[Match], path: str, key: str) -> Match:
    name = key.removesuffix(".")
    chosen = [match for match in matches if match.key == name]
    # A key of the file alone, whatever prefix its names have; else the end of a prefix.
    chosen += [match for match in matches if match.key.startswith(f"{name}.")]
    if not chosen:
        chosen = [match for match in matches if match.key.endswith(f".{name}")]
    if not chosen:
        keys = [match.key for match in matches if match.key]
        present = ", ".join(keys) or "one set of weights"
        raise ConfigError(
            "model.weights_key",
            f'{path} has no "{key}"{nearest(key, keys)}; it has {present}',
        )
    return max(chosen, key=lambda match: match.fitting)


def _readings(
    name: str, tensors: Tensors, own: Tensors, *, best_only: bool
) -> list[Match]:
    """The names as they are, and without or with a prefix, where more tensors fit that way."""
    notes = [f"{name} of the file"] if name else []
    if _are_compiled(tensors) and not _are_compiled(own):
        # Anywhere in a name: a part of a model may be compiled by itself.
        tensors = {key.replace(COMPILED, ""): value for key, value in tensors.items()}
        notes.append(f'names without "{COMPILED}"')

    def reading(renamed: Tensors, key: str, *further_notes: str) -> Match:
        note = ", ".join([*notes, *further_notes])
        return Match(renamed, key, note, _count(renamed, own))

    plain = reading(tensors, name)
    readings = []
    for prefix in _prefixes(tensors, own):
        renamed = _without_prefix(tensors, prefix)
        key = f"{name}.{prefix}".strip(".")
        readings.append(reading(renamed, key, f'names without "{prefix}"'))
    for prefix in _prefixes(own, tensors):
        renamed = {f"{prefix}{key}": value for key, value in tensors.items()}
        readings.append(reading(renamed, name, f'names with "{prefix}" before them'))
    others = [match for match in readings if match.fitting > plain.fitting]
    if not others:
        return [plain]
    if not best_only:
        return others
    best = max(match.fitting for match in others)
    return [match for match in others if match.fitting == best]


def _are_compiled(tensors: Tensors) -> bool:
    return any(COMPILED in name for name in tensors)


def _without_prefix(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors, without the prefix where a name has it."""
    renamed = {}
    rest = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            renamed[name.removeprefix(prefix)] = tensor
        else:
            rest[name] = tensor
    # The rest stays, so that it is counted as not used.
    for name, tensor in rest.items():
        renamed.setdefault(name, tensor)
    return renamed


def _prefixes(longer: Tensors, shorter: Tensors) -> list[str]:
    """Every prefix with which a name of `shorter` is a name of `longer` of the same shape, the commonest first."""
    counts: Counter[str] = Counter()
    for name, tensor in longer.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            prefix = ".".join(parts[:depth])
            rest = ".".join(parts[depth:])
            if rest in shorter and shorter[rest].shape == tensor.shape:
                counts[f"{prefix}."] += 1
    # Each is tried on all names, and the one that fits best is among the commonest.
    return [prefix for prefix, _ in counts.most_common(10)]


def _count(tensors: Tensors, own: Tensors) -> int:
    """How many of `own` are among `tensors`, by name and shape."""
    count = 0
    for name, tensor in own.items():
        if name in tensors and tensors[name].shape == tensor.shape:
            count += 1
    return count
