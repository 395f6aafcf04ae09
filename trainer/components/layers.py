"""The layers of a model in order: as it says itself (timm's `group_matcher`), else as its modules are nested."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.components.heads import parent_names
from trainer.errors import ConfigError
from trainer.exact.shards import original_class

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# In a `group_matcher`, the suffix of what belongs to the layer before.
WITH_PREVIOUS = 99999
# The group of what no pattern of a `group_matcher` matches: with the head.
UNMATCHED = (float("inf"),)
# Members of a layer: the names of modules.
Layer = list[str]


def layers_of(model: nn.Module, head: str) -> dict[str, int]:
    """The layer of each parameter, counted from 0; the head is the last.

    A model with a `group_matcher`, as timm's have, says itself which parameters are of one layer. Elsewhere a layer is
    a member of an `nn.Sequential` or `nn.ModuleList` (of the innermost, if these are nested), such as a residual or
    transformer block, also of one within a module such as a stage of blocks; outside of these, any module with
    parameters. Norm layers by themselves, and parameters directly in a module of layers (position embeddings), belong
    to the layer before, and what else a stage holds (its downsampling) to its first block.
    """
    layers = _layers_before_head(model, head)
    last = max(layers.values(), default=-1) + 1
    in_order: dict[str, int] = {}
    for name, _ in model.named_parameters():
        in_order[name] = layers.get(name, last)
    return in_order


def _layers_before_head(model: nn.Module, head: str) -> dict[str, int]:
    matcher = getattr(model, "group_matcher", None)
    if callable(matcher):
        return _layers_by_matcher(model, matcher, head)
    return _layers_by_nesting(model, head)


# ---------------------------------------------------------------- as the model says


def _layers_by_matcher(
    model: nn.Module, matcher: Callable[..., Any], head: str
) -> dict[str, int]:
    """The layers of all that a pattern matches and is not of the head."""
    groups: dict[str, tuple[float, ...]] = {}
    try:
        group_of = _group_finder(matcher(coarse=False))
        for name, _ in model.named_parameters():
            if not name.startswith(f"{head}."):
                groups[name] = group_of(name)
    except Exception as error:
        # Anything: the matcher is the model's own code.
        raise ConfigError(
            "optimizer.layer_decay",
            f"the model's group_matcher, which says what its layers are, failed: {type(error).__name__}: {error}",
        ) from None
    number = -1
    numbers: dict[tuple[float, ...], int] = {}
    matched = set(groups.values()) - {UNMATCHED}
    for group in sorted(matched):
        if number < 0 or group[-1] != WITH_PREVIOUS:
            number += 1
        numbers[group] = number
    layers: dict[str, int] = {}
    for name, group in groups.items():
        if group in numbers:
            layers[name] = numbers[group]
    return layers


def _group_finder(matcher: Any) -> Callable[[str], tuple[float, ...]]:
    """From a parameter's name to its group: the number of its pattern, then the numbers that the pattern finds."""
    if not isinstance(matcher, Mapping):
        return _group_asker(matcher)
    patterns = _patterns_of(matcher)

    def find(name: str) -> tuple[float, ...]:
        for pattern, number, suffix in patterns:
            match = pattern.match(name)
            if match is not None:
                numbers = [float(text) for text in match.groups() if text is not None]
                return (float(number), *numbers, *map(float, suffix))
        return UNMATCHED

    return find


def _group_asker(matcher: Any) -> Callable[[str], tuple[float, ...]]:
    """The same from a function of the model's own, which may give one number alone."""

    def ask(name: str) -> tuple[float, ...]:
        group = matcher(name)
        if isinstance(group, list | tuple):
            return tuple(group)
        return (group,)

    return ask


def _patterns_of(
    matcher: Mapping[Any, Any],
) -> list[tuple[re.Pattern[str], int, tuple[int, ...]]]:
    """Each pattern, the number of its entry, and what follows the numbers that it finds."""
    patterns = []
    for number, entry in enumerate(matcher.values()):
        pairs = [(entry, None)] if isinstance(entry, str) else entry or ()
        for pattern, suffix in pairs:
            compiled = re.compile(pattern)
            patterns.append((compiled, number, suffix or ()))
    return patterns


# ---------------------------------------------------------------- as it is nested


def _layers_by_nesting(model: nn.Module, head: str) -> dict[str, int]:
    """The layers of all parameters that are not of the head."""
    number_of_module: dict[str, int] = {}
    number = -1
    for layer in _layers_in(model, ""):
        if layer == [head]:
            continue
        # A norm between layers would otherwise push everything before it one step of `layer_decay` further down.
        is_norm = isinstance(model.get_submodule(layer[0]), NORMS)
        if number < 0 or not is_norm:
            number += 1
        for name in layer:
            number_of_module[name] = number
    layers: dict[str, int] = {}
    current = 0
    for name, _ in model.named_parameters():
        if name.startswith(f"{head}."):
            continue
        # A parameter outside every layer, such as a position embedding, takes the layer of the one before it.
        for module in parent_names(name):
            if module in number_of_module:
                current = number_of_module[module]
                break
        layers[name] = current
    return layers


def _layers_in(module: nn.Module, prefix: str) -> Iterator[Layer]:
    """The layers within `module`, in order, each as the dotted names of its modules."""
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        path = f"{prefix}{name}"
        # A container within a container's member is the inside of a block.
        holds_layers = not _is_container(module) and _holds_container(child)
        if _is_container(child) or holds_layers:
            yield from _layers_in(child, f"{path}.")
        elif (blocks := _blocks_of(child)) is not None:
            yield from _layers_of_stage(child, path, blocks)
        else:
            yield [path]


def _layers_of_stage(stage: nn.Module, path: str, blocks: str) -> Iterator[Layer]:
    """A layer for each block; what stands before the blocks is of the first, what comes after of the last."""
    sequence = stage.get_submodule(blocks)
    inner = f"{path}.{blocks}".rstrip(".")
    layers = []
    for name, _ in sequence.named_children():
        layers.append([f"{inner}.{name}"])
    if blocks:
        # Where the blocks are the stage itself, nothing stands beside them.
        names = [name for name, _ in stage.named_children()]
        paths = [f"{path}.{name}" for name in names]
        position = names.index(blocks)
        layers[0] += paths[:position]
        layers[-1] += paths[position + 1 :]
    yield from layers


def _blocks_of(module: nn.Module) -> str | None:
    """Where a stage holds its blocks: the name of a child, "" for the stage itself; None for what is no stage.

    Blocks are alike and made of parts; a sequence of single operations, or of different ones, is the inside of a block.
    """
    candidates = {"": module, **dict(module.named_children())}
    sequences = []
    for name, part in candidates.items():
        if _is_sequence_of_blocks(part):
            sequences.append(name)
    # Several run beside each other.
    return sequences[0] if len(sequences) == 1 else None


def _is_sequence_of_blocks(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    members = list(module.children())
    kinds = {type(member) for member in members}
    if len(kinds) != 1:
        return False
    for member in members:
        if isinstance(member, nn.Sequential) or not _has_parts(member):
            return False
    return True


def _has_parts(module: nn.Module) -> bool:
    return any(
        next(child.parameters(), None) is not None for child in module.children()
    )


def _holds_container(module: nn.Module) -> bool:
    return any(_is_container(part) for part in module.children())


def _is_container(module: nn.Module) -> bool:
    return original_class(module) in (nn.Sequential, nn.ModuleList)
