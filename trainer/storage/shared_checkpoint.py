"""A checkpoint read by the main process alone, and sent to the others: no other machine needs to see its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.exact.shards import has_shards
from trainer.process.ranks import Ranks
from trainer.storage import checkpoint
from trainer.storage.checkpoint import Checkpoint
from trainer.storage.stateful import join_state, split_state
from trainer.storage.whole_tensors import share, spread


def load_on_all(
    paths: Sequence[Path],
    module: nn.Module,
    ranks: Ranks,
    check: Callable[[Checkpoint], None],
) -> tuple[Checkpoint, list[str]]:
    """The first of `paths` that can be read, on every rank, and notes on the others. Only rank 0 reads. A collective.

    The weights go tensor by tensor into `module`, and the result's `model` on the other ranks is the module's own
    tensors. Raises what reading and `check` raise on rank 0, on every rank, before the module is changed.
    """
    contents: list[Checkpoint] = []  # empty on all ranks but 0

    def read() -> tuple[Checkpoint, list[str]]:
        content, notes = checkpoint.load_newest(paths)
        check(content)
        checkpoint.restore_model(module, content.model)
        contents.append(content)
        # What is sent at once: plain values.
        return replace(content, model={}, optimizer={}, stateful={}), notes

    received, notes = ranks.on_main(read)
    if ranks.count == 1:
        return contents[0], notes
    own_model = contents[0].model if contents else {}
    if has_shards(module):
        spread(module, own_model, ranks)
    else:
        ranks.broadcast_parameters(module)
    own = contents[0] if contents else received
    content = replace(
        received,
        model=own.model or module.state_dict(),
        optimizer=share(own.optimizer, module, ranks),
        stateful=_share_states(own.stateful, ranks),
    )
    return content, notes


def _share_states(
    states: dict[str, dict[Any, Any]], ranks: Ranks
) -> dict[str, dict[Any, Any]]:
    """The states of rank 0's `states`, by name, on every rank."""
    trees: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, state in states.items():
        trees[name], tensors[name] = split_state(name, state)
    results: dict[str, dict[Any, Any]] = {}
    for name, tree in ranks.on_main(lambda: trees).items():
        own = tensors.get(name, {})  # rank 0 alone has any
        results[name] = join_state(tree, ranks.broadcast_tensors(own))
    return results
