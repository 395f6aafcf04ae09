"""Loading with `data.bad_samples=quarantine`: micro-batches without the samples that cannot be read.

What a rank cannot read is known once its micro-batches are loaded. So those of a whole step are loaded before it
begins, and the ranks agree on what is left out of it. Their hosts wait for one another then, their devices never.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from time import perf_counter

from trainer.data.bad_samples import BadSample, Quarantine
from trainer.data.batches import Loaded, MicroBatch, Request
from trainer.data.loading import Loader
from trainer.data.look_up import LookUpLoader, can_look_up
from trainer.data.requests import step_request, step_requests
from trainer.data.train_loader import TrainLoader
from trainer.exact.plan import Plan, Step
from trainer.exact.remaining import remaining_step
from trainer.process.activity import AGREEING, COMPUTING, LOADING, activity

# The ids and occurrences of a loaded micro-batch, and `fused`.
Key = tuple[tuple[tuple[int, int], ...], int]


class RemainingTrainLoader(TrainLoader):
    """As `TrainLoader`, without bad samples. `prepare` loads all of this rank's micro-batches of a step."""

    def __init__(
        self,
        loader: Loader,
        plan: Plan,
        rank: int,
        first_step: int,
        *,
        fuse: int,
        quarantine: Quarantine,
    ) -> None:
        self._quarantine = quarantine
        self._part = loader.dataset.label
        # What is asked for in each step, decided when it is first needed: what is found later is not in it.
        self._asked: dict[int, list[Request]] = {}
        self._awaited_request: Request | None = None
        self._first: Loaded | None = None  # already taken from `_items`
        self._ready: list[MicroBatch] = []  # of the step that is trained next
        super().__init__(loader, plan, rank, first_step, fuse)

    def _open(self, first_step: int) -> None:
        self._items = loaded(self._loader, self._requests(first_step))
        self._next_step = first_step

    def close(self) -> None:
        self._items.close()

    def peek(self) -> MicroBatch | None:
        if not self._requests_of(self._plan.step(self._next_step)):
            return None
        self._first = self._take()
        if self._first.bad or self._first.batch is None:
            return None
        return next(self._loader.place(iter([self._first.batch])))

    def prepare(self, step: Step) -> Step:
        """The step without its bad samples, the same on every rank. A collective of hosts.

        Raises `DataError` where there are more of them than `data.max_bad`.
        """
        start = perf_counter()
        self._quarantine.step = step.number
        self._next_step = step.number
        bad: list[BadSample] = []
        held: dict[Key, MicroBatch] = {}
        for request in self._requests_of(step):
            self._awaited_request = request
            activity.mark(LOADING)
            item = self._take()
            bad += item.bad
            if item.batch is not None:
                held[_key(item.request)] = item.batch
        del self._asked[step.number]
        is_new = True
        while is_new:
            activity.mark(AGREEING)
            is_new = self._quarantine.agree(bad)
            known = self._quarantine.ids(self._part)
            remaining = remaining_step(self._plan, step, known)
            bad = self._make_ready(remaining, held)
        if bad:
            raise bad[0].error()  # it could be read before
        self._seconds_waited += perf_counter() - start
        return remaining

    def step(self, step: Step) -> Iterator[MicroBatch]:
        ready, self._ready = self._ready, []
        activity.mark(COMPUTING)
        yield from self._loader.place(iter(ready))

    def _describe_awaited(self) -> str:
        if self._awaited_request is None:
            return ""
        return self._name_all(self._awaited_request.ids)

    def _take(self) -> Loaded:
        if self._first is not None:
            item, self._first = self._first, None
            return item
        return next(self._items)

    def _make_ready(self, step: Step, held: dict[Key, MicroBatch]) -> list[BadSample]:
        """Find the micro-batches of `step` among those `held`, and load the others; returns what is bad."""
        self._ready = []
        bad: list[BadSample] = []
        for first, end in self._plan.groups(step, self._rank, self._fuse):
            request = step_request(self._plan, step, first, end)
            key = _key(request)
            if key not in held:
                item = load_now(self._loader, request)
                bad += item.bad
                if item.bad or item.batch is None:
                    continue
                held[key] = item.batch
            self._ready.append(held[key]._replace(first=first))
        return bad

    def _requests(self, first_step: int) -> Iterator[Request]:
        for step in self._plan.steps(first_step):
            yield from self._requests_of(step)

    def _requests_of(self, step: Step) -> list[Request]:
        requests = self._asked.get(step.number)
        if requests is None:
            known = self._quarantine.ids(self._part, step.number)
            remaining = remaining_step(self._plan, step, known)
            requests = []
            for first, end in self._plan.groups(remaining, self._rank, self._fuse):
                requests.append(step_request(self._plan, remaining, first, end))
            self._asked[step.number] = requests
        return requests


def train_loader(
    loader: Loader,
    plan: Plan,
    rank: int,
    first_step: int,
    *,
    fuse: int,
    quarantine: Quarantine | None,
) -> TrainLoader:
    """What trains in a run with this quarantine, or with none; the arguments are those of `TrainLoader`."""
    if quarantine is None:
        kind = LookUpLoader if can_look_up(loader, plan) else TrainLoader
        return kind(loader, plan, rank, first_step, fuse)
    return RemainingTrainLoader(
        loader, plan, rank, first_step, fuse=fuse, quarantine=quarantine
    )


def remaining_steps(
    loader: Loader, plan: Plan, steps: Sequence[Step], rank: int, quarantine: Quarantine
) -> list[Step]:
    """`steps` without their bad samples, those of steps to come included; only steps with samples. A collective."""
    part = loader.dataset.label
    known = quarantine.ids(part)
    to_come = [step for step in steps if step.number > quarantine.step]
    if to_come:
        requests: list[Request] = []
        for step in to_come:
            requests += step_requests(plan, remaining_step(plan, step, known), rank)
        bad: list[BadSample] = []
        for item in loaded(loader, requests):
            bad += item.bad
        quarantine.agree(bad)
        known = quarantine.ids(part)
    remaining = [remaining_step(plan, step, known) for step in steps]
    return [step for step in remaining if step.size]


def loaded(
    loader: Loader, requests: Iterable[Request]
) -> Generator[Loaded, None, None]:
    """What there is of each request to a data set that leaves out what it cannot read."""
    for item in loader.load(requests):
        assert isinstance(item, Loaded), "the data set leaves out what it cannot read"
        yield item


def load_now(loader: Loader, request: Request) -> Loaded:
    """Load a request in this process, where it was not asked for ahead."""
    item = loader.load_here(request)
    assert isinstance(item, Loaded), "the data set leaves out what it cannot read"
    return item


def _key(request: Request) -> Key:
    return tuple(request.pairs()), request.fused
