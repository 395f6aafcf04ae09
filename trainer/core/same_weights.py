"""Do all ranks hold the same weights? Compared before each save, also that of an epoch's end."""

from __future__ import annotations

from torch import Tensor

from trainer.core.preflight import compute_alike
from trainer.core.run import Run
from trainer.errors import LockstepError, first_few
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.moving_buffers import NORM_BUFFERS, other_buffers
from trainer.exact.shards import is_shard
from trainer.storage.digest import digest, hexadecimal

MAX_NAMED_RANKS = 8


def check_same_weights(run: Run, steps_done: int) -> None:
    """Raise `LockstepError` on every rank if one holds other weights than rank 0. A collective.

    The running statistics must be the true ones (`Reduction.gather`). Waits for the device. Not compared is what may
    differ by rounding: in standard mode, ranks on unlike hardware.
    """
    ranks = run.ranks
    if ranks.count == 1 or not (run.bitwise or compute_alike(run.facts_of_ranks)):
        return
    tensors = _tensors_to_compare(run)
    digests = ranks.gather([hexadecimal(digest(tensors))])
    if len(set(digests)) == 1:
        return
    own = {name: hexadecimal(digest({name: tensors[name]})) for name in tensors}
    of_ranks = ranks.gather([own])
    name, different = _first_difference(of_ranks)
    places = [f"rank {rank} on {ranks.machines[rank]}" for rank in different]
    parted = first_few(places, MAX_NAMED_RANKS)
    advice = ""
    if name.rpartition(".")[2] in NORM_BUFFERS:
        advice = (
            "; an observer that reads running statistics in `step`, as a teacher that follows does, says "
            "`reads_statistics = True`"
        )
    raise LockstepError(
        f"the ranks have parted: after step {steps_done}, {name} on {parted} is not that of rank 0; the model, "
        f"the loss or an observer changes it by what one rank alone sees{advice}. Nothing of this is saved. To see "
        f"at which step it begins, compare with a run on one process: `python -m trainer compare`"
    )


def _tensors_to_compare(run: Run) -> dict[str, Tensor]:
    """What a checkpoint holds of the model and its loss."""
    whole = ModelAndLoss(run.module, run.task)
    tensors: dict[str, Tensor] = {}
    for name, parameter in whole.named_parameters():
        # Of a parameter that is shared out each rank holds another part, and nobody a second one.
        if not is_shard(parameter):
            tensors[name] = parameter
    for buffer in other_buffers(whole, norms=True):
        if buffer.is_saved:
            tensors[buffer.name] = buffer.tensor
    return tensors


def _first_difference(of_ranks: list[dict[str, str]]) -> tuple[str, list[int]]:
    """The first tensor that some rank has otherwise than rank 0, and all ranks that do."""
    first = of_ranks[0]
    for name in first:
        different = [
            rank
            for rank, other in enumerate(of_ranks)
            if other.get(name) != first[name]
        ]
        if different:
            return name, different
    return "the set of tensors", [1]
