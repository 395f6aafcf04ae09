"""Evaluation loads the same requests again and again: whole, or without the samples that cannot be read."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence

import numpy as np

from trainer.data.bad_samples import BadSample, Quarantine
from trainer.data.batches import Loaded, MicroBatch, Request
from trainer.data.left_out import load_now, loaded
from trainer.data.loading import Loader


class Passes:
    """The micro-batches of the same `requests`, once for each evaluation. Loader processes live on in between."""

    def __init__(self, loader: Loader, requests: Sequence[Request]) -> None:
        self._loader = loader
        self._asked = requests
        self._batches: Generator[MicroBatch, None, None] | None = None

    @property
    def requests(self) -> Sequence[Request]:
        """Those of the next pass, as far as is known."""
        return self._asked

    def batches(self) -> Iterator[tuple[Request, MicroBatch]]:
        """One pass."""
        if self._batches is None:
            self._batches = self._loader.run(itertools.cycle(self._asked))
        batches = itertools.islice(self._batches, len(self._asked))
        yield from zip(self._asked, batches, strict=True)

    def agree(self) -> None:
        """After a pass: leave out on every rank what was found to be bad. A collective."""

    def close(self) -> None:
        """End the loader processes; the next pass starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


class RemainingPasses(Passes):
    """As `Passes`, without bad samples: a request has those that remain, and one of which none remains is left out."""

    def __init__(
        self, loader: Loader, requests: Sequence[Request], quarantine: Quarantine
    ) -> None:
        super().__init__(loader, requests)
        self._quarantine = quarantine
        self._part = loader.dataset.label
        self._items: Generator[Loaded, None, None] | None = None
        self._bad: list[BadSample] = []  # of this rank, in this pass

    @property
    def requests(self) -> Sequence[Request]:
        known = self._quarantine.ids(self._part)
        requests = [_without(request, known) for request in self._asked]
        return [request for request in requests if len(request.ids)]

    def batches(self) -> Iterator[tuple[Request, MicroBatch]]:
        self._bad = []
        used: list[Request] = []
        batches = self._loader.place(self._remaining(used))
        for index, batch in enumerate(batches):
            yield used[index], batch

    def agree(self) -> None:
        self._quarantine.agree(self._bad)
        self._bad = []

    def close(self) -> None:
        if self._items is not None:
            self._items.close()
            self._items = None

    def _remaining(self, used: list[Request]) -> Iterator[MicroBatch]:
        """The micro-batches of which something remains; their requests, so far, are in `used`."""
        if self._items is None:
            self._items = loaded(self._loader, self._ask())
        known = self._quarantine.ids(self._part)
        for asked in self._asked:
            item = next(self._items)
            self._bad += item.bad
            found = {bad.id for bad in item.bad}
            request = _without(asked, known | found)
            if not len(request.ids):
                continue
            if not np.array_equal(request.ids, item.request.ids):
                # Loaded ahead, before one of its samples was left out.
                item = load_now(self._loader, request)
                if item.bad:
                    raise item.bad[0].error()  # it could be read before
            assert item.batch is not None
            used.append(request)
            yield item.batch

    def _ask(self) -> Iterator[Request]:
        while True:
            for request in self._asked:
                yield _without(request, self._quarantine.ids(self._part))


def passes(
    loader: Loader, requests: Sequence[Request], quarantine: Quarantine | None
) -> Passes:
    """What evaluates `requests` in a run with this quarantine, or with none."""
    if quarantine is None:
        return Passes(loader, requests)
    return RemainingPasses(loader, requests, quarantine)


def _without(request: Request, known: frozenset[int]) -> Request:
    if not known:
        return request
    return request.only(~np.isin(request.ids, list(known)))
