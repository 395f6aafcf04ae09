"""How other code joins a run: observers of its steps, and objects whose state is saved in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from trainer.components.task import WeightedSum
from trainer.core.evaluated_weights import evaluated_phase
from trainer.core.evaluation import OnBatch
from trainer.core.metrics import Row
from trainer.core.run import Run
from trainer.data.batches import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.plan import Ids, Step


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

    # False for one that never calls `run.stop`. Where no observer may, ranks need not agree on it at every row.
    may_stop = True

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

    def evaluation_batch(
        self, evaluation: str, ids: Ids, output: Any, targets: Any
    ) -> None:
        """After each batch of an evaluation, on the rank that ran it.

        `evaluation` is the first part of its columns: `val`, or `val_ema` for the averaged weights. `ids`, `(N,)`, are
        the samples' indices in the validation data: over all ranks and batches each comes once. `output` is the
        model's, `targets` the data's.
        """

    def evaluation(self, evaluation: str, step: Step, metrics: Row) -> None:
        """After the last batch of an evaluation, on every rank, with its means over all samples.

        `run.module` holds the weights that were evaluated. `row` comes next, which may add columns.
        """

    def figures(self, step: Step, directory: Path) -> Mapping[str, Path]:
        """After an evaluation's row was logged, on the main process, with `run.figures`: draw into `directory`.

        Returns the PNG and CSV files by the names under which W&B is to have them.
        """
        return {}

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


def _do_nothing() -> None:
    pass


class Observers:
    """Several observers, called in their order.

    Attributes: `all` of them; `look_at_gradients`, True if one overrides `gradient`: then fp16's gradients must be
    unscaled in every step.
    """

    def __init__(
        self, observers: list[Observer], after: Callable[[], None] = _do_nothing
    ) -> None:
        """`after` is called once they have been, to undo what they did to the process. Not by steps, which call it."""
        for observer in observers:
            check_observer(observer)
        self.all = observers
        self.after = after
        self._note_methods()

    def __iter__(self) -> Iterator[Observer]:
        return iter(self.all)

    def add(self, observer: Observer) -> None:
        """Call `observer` too, from now on."""
        check_observer(observer)
        self.all.append(observer)
        self._note_methods()

    def remove(self, observer: Observer) -> None:
        """Stop calling `observer`."""
        self.all.remove(observer)
        self._note_methods()

    def _note_methods(self) -> None:
        # Every step asks for it.
        self.look_at_gradients = bool(self._with_own("gradient"))

    @property
    def may_stop(self) -> bool:
        """True if one of them may ask for the run's end."""
        return any(observer.may_stop for observer in self.all)

    def _with_own(self, method: str) -> list[Observer]:
        """Those that override a method."""
        return [
            observer
            for observer in self.all
            if getattr(type(observer), method) is not getattr(Observer, method)
        ]

    @property
    def read_statistics(self) -> bool:
        """True if one of them reads running statistics after each step."""
        return any(observer.reads_statistics for observer in self.all)

    def begin(self, run: Run) -> None:
        for observer in self.all:
            observer.begin(run)
        self.after()

    def watch(self, evaluation: str, phase: str) -> OnBatch | None:
        """What `evaluation` calls after each batch of the set of `phase`; None if no observer looks at them."""
        watchers = self._with_own("evaluation_batch")
        name = evaluated_phase(phase, evaluation)
        if not watchers:
            return None

        def see(ids: Ids, output: Any, targets: Any) -> None:
            for observer in watchers:
                observer.evaluation_batch(name, ids, output, targets)
            self.after()

        return see

    def evaluation(self, evaluation: str, step: Step, metrics: Row) -> None:
        for observer in self.all:
            observer.evaluation(evaluation, step, dict(metrics))
        self.after()

    def figures(self, step: Step, directory: Path) -> dict[str, Path]:
        """The files that they have drawn. On the main process."""
        files: dict[str, Path] = {}
        for observer in self._with_own("figures"):
            directory.mkdir(exist_ok=True)
            drawn = observer.figures(step, directory)
            _check_figures(observer, drawn)
            files |= drawn
        self.after()
        return files

    @property
    def draw_figures(self) -> bool:
        """True if one of them draws."""
        return bool(self._with_own("figures"))

    def row(self, row: Row) -> None:
        for observer in self.all:
            before = dict(row)
            observer.row(row)
            _check_row(observer, before, row)
        self.after()

    def epoch(self, step: Step, row: Row) -> None:
        for observer in self.all:
            observer.epoch(step, row)
        self.after()

    def end(self, summary: Mapping[str, Any]) -> None:
        for observer in self.all:
            observer.end(summary)
        self.after()


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


def _check_figures(observer: Observer, files: Any) -> None:
    """Raise `ConfigError` where an observer's figures are not files by name."""
    is_named = isinstance(files, Mapping) and all(isinstance(n, str) for n in files)
    if is_named and all(isinstance(p, Path) and p.is_file() for p in files.values()):
        return
    raise ConfigError(
        "observers",
        f"{type(observer).__qualname__}.figures returns {files!r}; return the paths of the files that it has drawn, "
        f'by name: {{"scatter": directory / "scatter.png"}}',
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
