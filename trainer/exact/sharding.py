"""Parameters shared out over the ranks by torch's `fully_shard` (FSDP2), block by block.

Each block is gathered before its forward, again before its backward, and let go after both. So a rank holds its part
of all parameters, their gradients and the optimizer's state, and the whole of one or two blocks at a time.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.exact.block_calls import BlockCalls
from trainer.exact.shards import has_shards, original_class
from trainer.process.ranks import Ranks

CONTAINERS = (nn.Sequential, nn.ModuleList)
# A gather takes its time however little it gathers, and a layer of a few thousand numbers is soon computed. So small
# layers are gathered together, with the model, as far as they add up to little.
SMALL_BYTES = 1 << 20
SMALL_BYTES_TOGETHER = 32 << 20


def blocks_of(module: nn.Module) -> list[str]:
    """The names of the blocks that are gathered one by one; what is in none of them is gathered with the model.

    Blocks are the modules of the classes that `_no_split_modules` names, as in Hugging Face's models. Without these,
    they are the items of every `nn.Sequential` and `nn.ModuleList`, but for small ones. No block lies within another,
    and none shares a parameter with what is outside of it.
    """
    classes = getattr(module, "_no_split_modules", None)
    if classes:
        return _that_are_apart(module, _of_classes(module, set(classes)))
    return _without_small(module, _that_are_apart(module, _items(module)))


def _without_small(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Those that are large, and small ones of which there are too many. Blocks of one size are treated alike."""
    sizes = {name: _bytes(module.get_submodule(name)) for name in names}
    counts = Counter(sizes.values())
    with_model: set[int] = set()
    together = 0
    for size in sorted(counts):
        together += size * counts[size]
        if size >= SMALL_BYTES or together > SMALL_BYTES_TOGETHER:
            break
        with_model.add(size)
    return [name for name, size in sizes.items() if size not in with_model]


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _that_are_apart(
    module: nn.Module, found: Iterable[tuple[str, nn.Module]]
) -> list[str]:
    """The names of those with parameters, which share none with what is outside of them."""
    places: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    names = []
    for name, block in found:
        own = list(block.parameters())
        is_apart = all(
            place.startswith(f"{name}.") for p in own for place in places[id(p)]
        )
        if own and is_apart:
            names.append(name)
    return names


def _of_classes(
    module: nn.Module, classes: set[str], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        if original_class(child).__name__ in classes:
            yield path + key, child
        else:
            yield from _of_classes(child, classes, f"{path}{key}.")


def _items(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    is_container = original_class(module) in CONTAINERS
    for key, child in module.named_children():
        # A subclass of a container, such as torchvision's Conv2dNormActivation, is one layer to its author.
        if is_container and type(child) not in CONTAINERS:
            yield path + key, child
        else:
            yield from _items(child, f"{path}{key}.")


def shard(module: nn.Module, ranks: Ranks) -> list[str]:
    """Leave this rank its part of rank 0's parameters of `module`, on the run's device. A collective.

    Returns the names of the parameters that somebody else, such as a loss with a list of them, still holds as they
    were: they are in the model no more. `refuse_what_cannot_be_cut` comes before it. A model that an earlier run has
    shared out stays as it is.
    """
    if has_shards(module):
        return []
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _copy_from_main(module, ranks)
    before = {name: weakref.ref(p) for name, p in module.named_parameters()}
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    names = blocks_of(module)
    for part in [*map(module.get_submodule, names), module]:
        # The model too: else its own parameters were whole after an evaluation, and parts after a step.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    _tolerate_unused(module)
    BlockCalls(module, names)
    gc.collect()  # what is garbage uses none of them
    return [name for name, parameter in before.items() if parameter() is not None]


def _tolerate_unused(module: nn.Module) -> None:
    """Let a rank send zeros for a parameter that its micro-batch leaves out: the others wait for that rank."""
    for part in module.modules():
        # Older torch has no such thing, and then waits until `run.timeout`.
        tolerate: Any = getattr(part, "set_reduce_scatter_unused_params", None)
        if tolerate is not None:
            tolerate(True)


@torch.no_grad()
def _copy_from_main(module: nn.Module, ranks: Ranks) -> None:
    """Rank 0's parameters and buffers on every rank, one at a time over the device: the whole may not fit there."""
    for tensor in module.state_dict().values():
        if isinstance(tensor, torch.Tensor):
            on_device = tensor.to(ranks.device)
            ranks.broadcast_tensor(on_device)
            tensor.copy_(on_device)


def refuse_what_cannot_be_cut(module: nn.Module) -> None:
    """Raise `ConfigError` for a parameter that cannot be shared out."""
    for name, parameter in module.named_parameters():
        reason = ""
        if not parameter.dim():
            reason = "is a single number; give it the shape (1,)"
        elif not parameter.numel():
            reason = "has no elements; leave it out"
        elif not parameter.is_contiguous():
            reason = "is not contiguous; make it so with .contiguous()"
        elif parameter.is_complex():
            reason = "is complex; hold it as real numbers, by torch.view_as_real"
        if reason:
            raise ConfigError(
                "train.parallel",
                f"fsdp cuts parameters along their first dimension, and {name} {reason}",
            )
