"""Samples by their ids: which of them hold no finite numbers, and how a message names them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trainer.data.batches import MicroBatch
from trainer.data.loading import Loader
from trainer.data.names import printable
from trainer.errors import listed
from trainer.exact.plan import Ids

NAMED_SAMPLES = 8


def rows_not_finite(values: Any, count: int) -> list[int]:
    """The rows, of `count`, in which any tensor of nested `values` is not finite."""
    is_bad = torch.zeros(count, dtype=torch.bool)
    for leaf in tree_leaves(values):
        is_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count
        if is_batch and leaf.is_floating_point():
            is_finite = leaf.cpu().isfinite().reshape(count, -1)
            is_bad |= ~is_finite.all(1)
    return is_bad.nonzero().flatten().tolist()


def samples_not_finite(
    loader: Loader, batch: MicroBatch, ids: Ids, epoch: int
) -> list[int]:
    """The samples of a batch that are not finite already in the data, after the transforms."""
    if loader.dataset.collation is None:
        rows = rows_not_finite((batch.inputs, batch.targets), len(ids))
        return [int(ids[row]) for row in rows]
    # Which part of the batch is which sample's is known to `data.collate` alone.
    bad = []
    for sample_id in ids.tolist():
        leaves = tree_leaves(loader.sample(sample_id, epoch))
        if not all(map(_is_finite, leaves)):
            bad.append(sample_id)
    return bad


def _is_finite(leaf: Any) -> bool:
    is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return not is_float or bool(leaf.isfinite().all())


def name_samples(dataset: Any, ids: list[int]) -> str:
    """Some sample ids, with their files where the data set has `paths`."""
    paths = getattr(dataset, "paths", None)
    ids = list(dict.fromkeys(ids))  # an epoch may have a sample several times
    names = [str(sample_id) for sample_id in ids]
    if paths is not None:
        names = [f"{i} ({printable(str(paths[i]))})" for i in ids]
    return listed(names, NAMED_SAMPLES)
