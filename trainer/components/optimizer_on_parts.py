"""Does an optimizer make the same weights of parts of parameters as of whole ones? Asked with `train.parallel=fsdp`.

torch's own are known (docs/multi-gpu.md). Another may take the norm of a parameter, say, of which a rank has a part
alone: torch then gives each rank another number, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.components.optimizer_modes import is_switched
from trainer.components.parameter_groups import Group
from trainer.config.model_sections import OptimizerConfig
from trainer.errors import ConfigError
from trainer.exact.seeding import preserved_cpu_generators
from trainer.exact.shards import is_shard, part_like, whole

STEPS = 2  # the second has what the first has left in the optimizer's state
MOST_OF_A_GROUP = (
    4  # stand-ins for the parameters of a group, of as many numbers of dimensions
)
BOUND = 1e-9  # relative, in fp64


def check_on_parts(
    section: OptimizerConfig,
    groups: Sequence[Group],
    make: Callable[[list[Group]], Any],
) -> None:
    """Raise `ConfigError`, on every rank, if what `make` returns updates parts otherwise. A collective with shards.

    It is tried on small tensors of random numbers in place of the parameters of `groups`.
    """
    parameters = [p for group in groups for p in group["params"]]
    if not any(map(is_shard, parameters)):
        return
    draw = torch.Generator().manual_seed(0)
    of_parts: list[Group] = []
    of_wholes: list[Group] = []
    for group in groups:
        shards = _examples(group["params"])
        values = [_random(_shape(shard), draw) for shard in shards]
        parts = []
        for shard, value in zip(shards, values, strict=True):
            parts.append(nn.Parameter(part_like(shard, value)))
        of_parts.append({**group, "params": parts})
        wholes = [nn.Parameter(whole(part).detach().clone()) for part in parts]
        of_wholes.append({**group, "params": wholes})
    with preserved_cpu_generators():
        _update(make(of_parts), of_parts)
        _update(make(of_wholes), of_wholes)
    for group, other in zip(of_parts, of_wholes, strict=True):
        for part, expected in zip(group["params"], other["params"], strict=True):
            if not torch.allclose(whole(part), expected, rtol=BOUND, atol=BOUND):
                raise ConfigError(
                    "optimizer.name",
                    f"{section.name} makes other weights of parts of parameters than of whole ones, as one does that "
                    f"takes the norm of a parameter; with train.parallel=fsdp use one that works element by element, "
                    f"or train.parallel=ddp",
                )


def _examples(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Some of the parameters, each of another number of dimensions."""
    by_dims: dict[int, Tensor] = {}
    for parameter in parameters:
        by_dims.setdefault(parameter.dim(), parameter)
    return list(by_dims.values())[:MOST_OF_A_GROUP]


def _shape(shard: Tensor) -> list[int]:
    """A small shape of as many dimensions, of which every rank has rows, and not all equally many."""
    as_shard: Any = shard
    rows = 2 * as_shard.device_mesh.size() + 1
    return [rows, *(min(size, 3) for size in shard.shape[1:])]


def _random(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def _update(optimizer: Any, groups: Sequence[Group]) -> None:
    """Take some steps, with the same gradients for parts and for whole tensors."""
    draw = torch.Generator().manual_seed(1)
    if is_switched(optimizer):
        optimizer.train()
    for _ in range(STEPS):
        for group in groups:
            for parameter in group["params"]:
                gradient = _random(parameter.shape, draw)
                if is_shard(parameter):
                    parameter.grad = part_like(parameter, gradient)
                else:
                    parameter.grad = gradient.to(parameter.device)
        optimizer.step()
