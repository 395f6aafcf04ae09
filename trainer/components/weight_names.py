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
    if len(equals) > 1 and 2 * best >= len(own):
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
        raise ConfigError(
            "model.weights_key",
            f'{path} has no "{key}"{nearest(key, keys)}; it has {", ".join(keys) or "one set of weights"}',
        )
    return max(chosen, key=lambda match: match.fitting)


def _readings(
    name: str, tensors: Tensors, own: Tensors, *, best_only: bool
) -> list[Match]:
    """The names as they are, and without or with a prefix, where more tensors fit that way."""
    notes = [f"{name} of the file"] if name else []
    if any(COMPILED in key for key in tensors) and not any(COMPILED in k for k in own):
        tensors = {key.replace(COMPILED, ""): value for key, value in tensors.items()}
        notes.append(f'names without "{COMPILED}"')
    plain = Match(tensors, name, ", ".join(notes), _count(tensors, own))
    readings = [plain]
    for prefix in _prefixes(tensors, own):
        renamed = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        # The rest stays, so that it is counted as not used.
        for key, value in tensors.items():
            if not key.startswith(prefix):
                renamed.setdefault(key, value)
        note = ", ".join([*notes, f'names without "{prefix}"'])
        dotted = f"{name}.{prefix}".strip(".")
        readings.append(Match(renamed, dotted, note, _count(renamed, own)))
    for prefix in _prefixes(own, tensors):
        renamed = {f"{prefix}{key}": value for key, value in tensors.items()}
        note = ", ".join([*notes, f'names with "{prefix}" before them'])
        readings.append(Match(renamed, name, note, _count(renamed, own)))
    others = [match for match in readings[1:] if match.fitting > plain.fitting]
    if not others:
        return [plain]
    if not best_only:
        return others
    best = max(match.fitting for match in others)
    return [match for match in others if match.fitting == best]


def _prefixes(longer: Tensors, shorter: Tensors) -> list[str]:
    """Every prefix with which a name of `shorter` is a name of `longer` of the same shape, the commonest first."""
    counts: Counter[str] = Counter()
    for name, tensor in longer.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            rest = ".".join(parts[depth:])
            if rest in shorter and shorter[rest].shape == tensor.shape:
                counts[".".join(parts[:depth]) + "."] += 1
    # Each is tried on all names, and the one that fits best is among the commonest.
    return [prefix for prefix, _ in counts.most_common(10)]


def _count(tensors: Tensors, own: Tensors) -> int:
    return sum(
        1
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape == tensor.shape
    )
