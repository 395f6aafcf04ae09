"""Is a sample the same whenever, in whatever order and by whichever process it is fetched?"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from trainer.core.proof.finding import Finding
from trainer.core.proof.generators import describe, generators_in, preserved_in
from trainer.core.proof.state import same_bits
from trainer.core.proof.trial import Trial
from trainer.data.batches import MicroBatch
from trainer.errors import DataError

CHECK = "samples"
# Of a loader process, which has one thread where this one may have more.
TOLERANCE = 1e-4
MOST_LISTED = 8
TRANSFORMED = 4  # images that are transformed together and alone
TIME_LIMIT = (
    1.0  # seconds for fetching samples once; fewer of them where each takes long
)
PARTS = ("input", "target")
REMEDY = (
    "draw from torch's, NumPy's or Python's global generator (torch.rand, np.random.rand, random.random), which "
    "Lockstep seeds for each sample"
)


def check_samples(trial: Trial) -> list[Finding]:
    """Fetch some samples twice, in two orders, and compare them with a loader process's: equal bytes."""
    loader = trial.run.train_loader
    if loader.batch_transforms is not None:
        finding = _compare_alone(trial)
        if finding is not None:
            return [finding]
    if not loader.dataset.draws:
        return []  # a look-up in memory
    with preserved_in(loader.dataset):
        ids, forwards, first = _fetch(trial)
        if ids and _differing_parts(first, forwards[0]):
            return [_overwritten(ids[0])]
        epoch = trial.step.epoch
        backwards = [loader.sample(sample_id, epoch) for sample_id in reversed(ids)]
    finding = _compare_in_process(trial, ids, forwards, backwards[::-1])
    if finding is None and loader.dataset.collation is not None:
        finding = _compare_batches(trial, ids)
    if finding is None and trial.batches is not None and not trial.is_idle:
        # Started now, with the data set as it was.
        finding = _compare_with_loader_process(trial, ids)
    return [] if finding is None else [finding]


def _fetch(trial: Trial) -> tuple[list[int], list[Any], Any]:
    """The ids of some samples, these samples, and a copy of the first of them, made before the others were fetched."""
    loader = trial.run.train_loader
    ids: list[int] = []
    samples = []
    first = None
    deadline = monotonic() + TIME_LIMIT
    for sample_id in _sample_ids(trial):
        try:
            sample = loader.sample(sample_id, trial.step.epoch)
        except DataError:
            if not loader.leaves_out:
                raise
            continue  # the run will leave it out
        if not ids:
            first = tree_map(_copy, sample)
        ids.append(sample_id)
        samples.append(sample)
        if monotonic() > deadline:
            break
    return ids, samples, first


def _copy(value: Any) -> Any:
    """Tensors and arrays are copied, and other objects are as they are."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _overwritten(sample_id: int) -> Finding:
    return Finding(
        CHECK,
        f"train sample {sample_id} changes when another one is fetched: the data set returns the same memory for each, "
        f"and a batch holds its last sample several times",
        "return a copy, as tensor.clone() and array.copy() do",
    )


def _sample_ids(trial: Trial) -> list[int]:
    """The first samples that this rank will train on: each rank tries its own."""
    share = (0, 1) if trial.is_idle else trial.step.ranks[trial.run.ranks.rank]
    ids: list[int] = trial.run.plan.sample_ids(trial.step, *share).tolist()
    return ids[: trial.samples]


def _compare_alone(trial: Trial) -> Finding | None:
    """What `data.batch_transforms` make of an image in a batch, against what they make of it by itself."""
    loader = trial.run.train_loader
    ids = _sample_ids(trial)[:TRANSFORMED]
    epoch = trial.step.epoch
    together = loader.peek(ids, epoch=epoch).inputs
    for row, sample_id in zip(together, ids, strict=True):
        alone = loader.peek([sample_id], epoch=epoch).inputs[0]
        if not same_bits(row, alone):
            return Finding(
                CHECK,
                f"data.batch_transforms make another image of train sample {sample_id} in a batch than alone",
                "let a transform of your own look at each image and its draws by themselves, and draw from nothing "
                "but the numbers it is given",
            )
    return None


def _compare_in_process(
    trial: Trial, ids: Sequence[int], first: Sequence[Any], second: Sequence[Any]
) -> Finding | None:
    for sample_id, one, other in zip(ids, first, second, strict=True):
        parts = _differing_parts(one, other)
        if not parts:
            continue
        generators = generators_in(trial.run.train_loader.dataset)
        draws = f": it draws from {describe(generators)}" if generators else ""
        return Finding(
            CHECK,
            f"train sample {sample_id} has another {parts} each time it is fetched{draws}",
            REMEDY,
        )
    return None


def _compare_batches(trial: Trial, ids: Sequence[int]) -> Finding | None:
    """The batch that `data.collate` makes of some samples: twice, and once more after another one."""
    loader = trial.run.train_loader
    assert loader.dataset.collation is not None
    epoch = trial.step.epoch
    batches = []
    with preserved_in(loader.dataset):
        for some_ids in (ids, ids, ids[-1:], ids):
            batch = loader.fetch(some_ids, epoch=epoch)
            batches.append((batch.inputs, batch.targets))
    first, second, _, third = batches
    parts = _differing_parts(first, second) or _differing_parts(first, third)
    if not parts:
        return None
    return Finding(
        CHECK,
        f"data.collate={loader.dataset.collation.name} makes another {parts} of the same samples each time",
        f"let it depend on its samples alone, not on earlier calls: {REMEDY}",
    )


def _compare_with_loader_process(trial: Trial, ids: Sequence[int]) -> Finding | None:
    """The first batch that the run's own loader processes made against the same samples made here."""
    assert trial.batches is not None
    batch = trial.batches.peek()
    if batch is None:
        return None  # a sample of it will be left out
    plan, step = trial.run.plan, trial.step
    occurrences = plan.occurrences(step, *batch.indices)
    if trial.run.train_loader.dataset.collation is not None:
        # A batch may be made in any way of its samples: only whole ones can be compared.
        ids = plan.sample_ids(step, *batch.indices).tolist()
        here = trial.peek(ids, occurrences)
        samples = (here.inputs, here.targets)
        theirs = (batch.inputs, batch.targets)
    else:
        first, end = batch.indices
        start, _ = step.micro_batches[first]
        _, stop = step.micro_batches[end - 1]
        ids = ids[: stop - start]
        if occurrences is not None:
            occurrences = occurrences[: len(ids)]
        here = trial.peek(ids, occurrences)
        samples = _first_samples(here, len(ids))
        theirs = _first_samples(batch, len(ids))
    parts = _differing_parts(samples, theirs, None if trial.exact else TOLERANCE)
    if not parts:
        return None
    listed = ", ".join(map(str, ids[:MOST_LISTED]))
    return Finding(
        CHECK,
        f"one of the train samples {listed} has another {parts} in a loader process "
        f"than in the run's own",
        f"let it depend on its index alone, not on the process (get_worker_info, the time, a process id): {REMEDY}",
    )


def _first_samples(batch: MicroBatch, count: int) -> tuple[Any, Any]:
    def first(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.dim() > 0
        return value[:count] if is_batch else value

    return tree_map(first, batch.inputs), tree_map(first, batch.targets)


def _differing_parts(
    first: Any, second: Any, tolerance: float | None = None
) -> str | None:
    """`input`, `target` or both, where two samples differ in them; None where they do not."""
    names = []
    for name, one, other in zip(PARTS, first, second, strict=True):
        leaves, structure = tree_flatten(one)
        other_leaves, other_structure = tree_flatten(other)
        is_same = structure == other_structure and all(
            _is_same(leaf, other_leaf, tolerance)
            for leaf, other_leaf in zip(leaves, other_leaves, strict=True)
        )
        if not is_same:
            names.append(name)
    return " and ".join(names) or None


def _is_same(first: Any, second: Any, tolerance: float | None) -> bool:
    """True if two leaves have the same bytes. Objects of unknown kinds count as the same."""
    if type(first) is not type(second):
        return False
    match first:
        case Tensor():
            return same_bits(first, second) or _is_close(first, second, tolerance)
        case np.ndarray() | np.generic():
            return bool(
                first.shape == second.shape and first.tobytes() == second.tobytes()
            )
        case bool() | int() | float() | complex() | str() | bytes():
            return repr(first) == repr(second)
    if hasattr(first, "tobytes"):  # an image of PIL
        return bool(first.tobytes() == second.tobytes())
    return True


def _is_close(first: Tensor, second: Tensor, tolerance: float | None) -> bool:
    if tolerance is None or not first.is_floating_point():
        return False
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    bound = tolerance * float(first.abs().max())
    return torch.allclose(first, second, rtol=0, atol=bound, equal_nan=True)
