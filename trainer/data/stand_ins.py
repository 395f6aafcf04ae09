"""Samples for what is tried before training: where one cannot be read, the next one that can stands in for it.

Nothing of this is trained. A trial needs micro-batches of their full size, whatever single samples are like.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer.data.batches import Loaded, Request
from trainer.errors import DataError


def load_with_stand_ins(
    load: Callable[[Request], Loaded | DataError],
    request: Request,
    *,
    count: int,
    most: int,
) -> Loaded:
    """What `load` gives, of `count` samples, leaving out what it cannot read: as many as are asked for, none bad.

    Raises `DataError`, the first bad sample's, where more than `most` samples cannot be read: then all may be like it.
    """
    unreadable: set[int] = set()
    first = None
    item = load(request)
    while isinstance(item, Loaded) and item.bad:
        first = first or item.bad[0]
        unreadable.update(bad.id for bad in item.bad)
        if len(unreadable) > min(most, count - 1):
            raise first.error()
        ids = [_next_of(i, unreadable, count) for i in request.ids.tolist()]
        item = load(request._replace(ids=np.array(ids)))
    if isinstance(item, DataError):
        raise item
    return item


def _next_of(sample_id: int, unreadable: set[int], count: int) -> int:
    """The sample itself, or the first one after it that is not known to be unreadable."""
    while sample_id in unreadable:
        sample_id = (sample_id + 1) % count
    return sample_id
