"""A rank's micro-batches in plan order, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import perf_counter

from trainer.data.batches import MicroBatch, Request
from trainer.data.loading import Loader
from trainer.data.requests import step_request
from trainer.errors import listed
from trainer.exact.plan import Ids, IndexRange, Plan, Step
from trainer.process.activity import COMPUTING, LOADING, activity

NAMED_SAMPLES = 4  # in a message


class TrainLoader:
    """A rank's micro-batches of every step from `first_step` (0-based) on, at most `fuse` at a time."""

    def __init__(
        self, loader: Loader, plan: Plan, rank: int, first_step: int, fuse: int = 1
    ) -> None:
        self._plan = plan
        self._rank = rank
        self._fuse = fuse
        # All but an epoch's last step are of one size.
        self._groups_by_size: dict[int, list[IndexRange]] = {}
        self._loader = loader
        self._open(first_step)
        self._next: MicroBatch | None = None  # already taken from `_batches`
        self._seconds_waited = 0.0
        self._name_sample = loader.name_sample
        self._awaited: tuple[Step, IndexRange] | None = None
        activity.samples = self._describe_awaited

    def _open(self, first_step: int) -> None:
        self._batches = self._loader.run(self._requests(first_step))

    def close(self) -> None:
        """End the loader processes."""
        self._batches.close()

    def prepare(self, step: Step) -> Step:
        """`step` as it is to be trained, which `step` then yields the micro-batches of. Called for every step."""
        return step

    def peek(self) -> MicroBatch | None:
        """The next micro-batch, which `step` will yield; None if it is not known to be the one that is trained."""
        return self._take_ahead()

    def _take_ahead(self) -> MicroBatch:
        if self._next is None:
            self._next = next(self._batches)
        return self._next

    def take_waited(self) -> float:
        """Seconds that the loop waited for micro-batches since the last call, by the host's clock."""
        seconds = self._seconds_waited
        self._seconds_waited = 0.0
        return seconds

    def step(self, step: Step) -> Iterable[MicroBatch]:
        """This rank's micro-batches of `step`. To be called for every step, in order."""
        for indices in self._groups(step):
            self._awaited = step, indices
            activity.mark(LOADING)
            start = perf_counter()
            batch = self._take_ahead()
            self._next = None
            self._seconds_waited += perf_counter() - start
            assert batch.indices == indices, "steps are taken in order"
            activity.mark(COMPUTING)
            yield batch

    def _describe_awaited(self) -> str:
        """The samples of the micro-batches that were asked for last, for the watchdog's thread."""
        if self._awaited is None:
            return ""
        step, (first, end) = self._awaited
        return self._name_all(self._plan.sample_ids(step, first, end))

    def _name_all(self, ids: Ids) -> str:
        names = [self._name_sample(sample) for sample in ids.tolist()]
        return listed(names, NAMED_SAMPLES)

    def _requests(self, first_step: int) -> Iterator[Request]:
        for step in self._plan.steps(first_step):
            for first, end in self._groups(step):
                yield step_request(self._plan, step, first, end)

    def _groups(self, step: Step) -> list[IndexRange]:
        """The micro-batches of `step` that this rank runs in one forward each."""
        if step.size not in self._groups_by_size:
            self._groups_by_size[step.size] = self._plan.groups(
                step, self._rank, self._fuse
            )
        return self._groups_by_size[step.size]
