"""How other code joins a run: observers of its steps, and objects whose state is saved in its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from trainer.components.task import WeightedSum
from trainer.core.build import Run
from trainer.core.metrics import Row
from trainer.data.samples import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.plan import Step


class Observer:
    """Code that runs beside training, on every rank. Override what you need; each method does nothing by itself.

    Give observers to `Trainer(…, observers=[…])`, or name their classes in the config under `observers`.

    An observer with `state_dict` and `load_state_dict` is `Stateful`: every checkpoint has its state.

    The step does not wait for the device. An observer that reads a tensor on the host (`.item()`, `.tolist()`,
    `print`) makes it wait, so do that at some steps only.

    An error in any method ends the run, as an error of the model would: on one rank, it ends the others as well.
    """

    # True for one that reads BatchNorm's running statistics in `step`. In standard mode on several ranks, each rank
    # holds its share of them then, unless some observer asks for the whole.
    reads_statistics = False

    def begin(self, run: Run) -> None:
        """Before the first step of this session. `run` holds model, data and plan.

        After a resume the model is the checkpoint's already; the observer's own state is loaded right after this.
        """

    def micro_batch(
        self, step: Step, batch: MicroBatch, output: Any, loss: WeightedSum
    ) -> None:
        """After the forward and backward of each of this rank's micro-batches (with `batch.fuse`, of several)."""

    def gradient(self, step: Step) -> None:
        """When the step's gradient is complete: the same on every rank, unscaled and clipped, before the update."""

    def step(self, step: Step) -> None:
        """After the update."""

    def row(self, row: Row) -> None:
        """Before a row is logged: add columns of your own to it.

        Their values are numbers. Rank 0's row is the one that is written, so a value that differs between ranks must
        be summed or gathered first. A change of another column, or another kind of value, raises `ConfigError`.
        """

    def epoch(self, step: Step, row: Row) -> None:
        """After an epoch's row was logged, its evaluation included; `step` is the epoch's last."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """After the run, with the contents of `summary.json`. Not called for a run that fails or is stopped."""


@runtime_checkable
class Stateful(Protocol):
    """An object whose state is part of the run: an averaged model, a running estimate, a counter.

    `state_dict` returns nested dicts and lists of tensors, numbers, strings, booleans and None, the same on every
    rank. Rank 0's is written as files of the checkpoint; on resume, on any number of ranks, every rank loads it.
    """

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class Observers:
    """Several observers, called in their order."""

    def __init__(self, observers: list[Observer]) -> None:
        for observer in observers:
            check_observer(observer)
        self._observers = observers

    def __iter__(self) -> Iterator[Observer]:
        return iter(self._observers)

    def add(self, observer: Observer) -> None:
        """Call `observer` too, from now on."""
        check_observer(observer)
        self._observers.append(observer)

    def remove(self, observer: Observer) -> None:
        """Stop calling `observer`."""
        self._observers.remove(observer)

    @property
    def look_at_gradients(self) -> bool:
        """True if one of them overrides `gradient`: then fp16's gradients must be unscaled in every step."""
        return any(
            type(observer).gradient is not Observer.gradient
            for observer in self._observers
        )

    @property
    def read_statistics(self) -> bool:
        """True if one of them reads running statistics after each step."""
        return any(observer.reads_statistics for observer in self._observers)

    def begin(self, run: Run) -> None:
        for observer in self._observers:
            observer.begin(run)

    def micro_batch(
        self, step: Step, batch: MicroBatch, output: Any, loss: WeightedSum
    ) -> None:
        for observer in self._observers:
            observer.micro_batch(step, batch, output, loss)

    def gradient(self, step: Step) -> None:
        for observer in self._observers:
            observer.gradient(step)

    def step(self, step: Step) -> None:
        for observer in self._observers:
            observer.step(step)

    def row(self, row: Row) -> None:
        for observer in self._observers:
            before = dict(row)
            observer.row(row)
            _check_row(observer, before, row)

    def epoch(self, step: Step, row: Row) -> None:
        for observer in self._observers:
            observer.epoch(step, row)

    def end(self, summary: Mapping[str, Any]) -> None:
        for observer in self._observers:
            observer.end(summary)


def _check_row(observer: Observer, before: Row, after: Row) -> None:
    """Raise `ConfigError` where an observer did more than add numbers to a row.

    Ranks choose the best model by their own rows: one changed on a single rank would leave the others waiting.
    """
    kind = type(observer).__qualname__
    for name, value in before.items():
        if after.get(name) is not value:
            raise ConfigError(
                "observers",
                f'{kind}.row changes "{name}"; add a column under a name of its own',
            )
    for name, value in after.items():
        if not isinstance(value, int | float):
            raise ConfigError(
                "observers",
                f'{kind}.row gives "{name}" a {type(value).__name__}; give it a number',
            )


def check_observer(observer: object) -> None:
    """Raise `ConfigError` unless `observer` is an object of a subclass of `Observer`."""
    if isinstance(observer, type) and issubclass(observer, Observer):
        raise ConfigError(
            "observers",
            f"{observer.__name__} is a class; give an object, {observer.__name__}(…)",
        )
    if not isinstance(observer, Observer):
        raise ConfigError(
            "observers",
            f"{type(observer).__qualname__} is not a subclass of trainer.Observer",
        )
