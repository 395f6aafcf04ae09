"""Which reduction makes one gradient of those of all micro-batches and ranks."""

from __future__ import annotations

from torch import nn

from trainer.core.graphs.refusal import sums_after_backward
from trainer.core.run import Run
from trainer.exact.bitwise import BitwiseReduction
from trainer.exact.flat import FlatReduction
from trainer.exact.reduction import Reduction
from trainer.exact.sharded import ShardedReduction
from trainer.exact.shards import has_shards
from trainer.exact.standard import StandardReduction


def build_reduction(run: Run, module: nn.Module, loss: nn.Module | None) -> Reduction:
    """The reduction of `module`, and of a loss with parameters of its own, in the run's mode. A collective."""
    kind: type[Reduction] = StandardReduction
    if run.bitwise:
        kind = BitwiseReduction
    elif has_shards(module):
        kind = ShardedReduction
    elif sums_after_backward(run):
        kind = FlatReduction
    return kind(
        module,
        run.config.batch_norm,
        run.ranks,
        find_unused_parameters=run.config.train.find_unused_parameters,
        loss=loss,
    )
