"""Samples that cannot be read, and on which of them the ranks of a run have agreed (`data.bad_samples=quarantine`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from trainer.errors import DataError, UnreadableError
from trainer.process.ranks import Ranks


class BadSample(NamedTuple):
    """Sample `id` of a `part` (train or val), left out from `step` on, and why. `path` is "" where there is none."""

    part: str
    id: int
    path: str
    reason: str
    step: int = 0

    def name(self) -> str:
        """What a message calls it."""
        name = f"{self.part} sample {self.id}"
        return f"{name} ({self.path})" if self.path else name

    def error(self) -> DataError:
        """The error that ends a run which does not leave it out."""
        return DataError(f"{self.name()}: {self.reason}")


def is_bad_sample(error: DataError) -> bool:
    """True if the sample is to blame, and not the disk, the network, memory or a limit of the system."""
    return not isinstance(error, UnreadableError)


class Quarantine:
    """The bad samples of a run, the same on every rank.

    A sample is left out from the step in which it was found to be bad, whatever becomes of its file. `keep`, if it is
    set, is told of new ones on every rank, before they are left out. `file` is what a message names as their list.
    """

    def __init__(self, ranks: Ranks, max_bad: int) -> None:
        self._ranks = ranks
        self._max_bad = max_bad
        self._by_key: dict[tuple[str, int], BadSample] = {}
        self.step = 0  # the one that is trained, or was trained last
        self.file = ""
        self.keep: Callable[[list[BadSample]], None] | None = None

    @property
    def samples(self) -> list[BadSample]:
        """All of them, in the order in which they were found."""
        return sorted(
            self._by_key.values(), key=lambda bad: (bad.step, bad.part, bad.id)
        )

    def __len__(self) -> int:
        return len(self._by_key)

    def ids(self, part: str, step: int | None = None) -> frozenset[int]:
        """The ids of `part` that are left out of `step`; by default of the present one."""
        last = self.step if step is None else step
        return frozenset(
            bad.id
            for bad in self._by_key.values()
            if bad.part == part and bad.step <= last
        )

    def take_over(self, samples: Iterable[BadSample]) -> None:
        """Leave out what an earlier session of the run has left out, each from its step on."""
        for bad in samples:
            self._add(bad)

    def agree(self, found: Iterable[BadSample]) -> bool:
        """Leave out what any rank has just found to be bad; returns whether anything is new. A collective of hosts.

        Raises `DataError`, the same on every rank, where there are more bad samples than `data.max_bad`.
        """
        new = [bad._replace(step=self.step) for bad in found if self._is_new(bad)]
        [is_any_new] = self._ranks.any_rank_each([bool(new)])
        if not is_any_new:
            return False
        everywhere = sorted(set(self._ranks.gather(new)))
        added = [bad for bad in everywhere if self._add(bad)]
        if self.keep is not None:
            self.keep(added)
        if len(self) > self._max_bad:
            raise self._too_many(added[-1])
        return True

    def _is_new(self, bad: BadSample) -> bool:
        known = self._by_key.get((bad.part, bad.id))
        return known is None or known.step > self.step

    def _add(self, bad: BadSample) -> bool:
        """Add a sample, unless it is left out from that step on already; returns whether it was added."""
        key = bad.part, bad.id
        known = self._by_key.get(key)
        if known is not None and known.step <= bad.step:
            return False
        self._by_key[key] = bad
        return True

    def _too_many(self, last: BadSample) -> DataError:
        listed = f"; {self.file} lists them" if self.file else ""
        return DataError(
            f"{len(self)} samples cannot be used, more than data.max_bad={self._max_bad}{listed}; the last is "
            f"{last.name()}: {last.reason}; repair or remove them, or raise data.max_bad"
        )
