"""A sweep's Optuna study: the values that trials get, what became of each, and which one is stopped early."""

from __future__ import annotations

import itertools
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.fields import show
from trainer.errors import ConfigError, LockstepError, first_line
from trainer.exact.seeding import key
from trainer.storage.files import lock_directory
from trainer.sweep.description import Sweep
from trainer.sweep.space import Parameter, Values, grid

if TYPE_CHECKING:
    import optuna

# Stopped: early; interrupted: will run again.
State = Literal["running", "interrupted", "done", "stopped", "failed"]


@dataclass
class Trial:
    """One trial.

    `value` is the best of the sweep's metric, `seconds` the running time over all its processes, `rungs` how often it
    was judged. `curve` holds every value of the metric, read from the run's own file.
    """

    number: int
    values: Values
    state: State = "running"
    value: float | None = None
    reason: str = ""
    seconds: float = 0.0
    rungs: int = 0
    curve: list[float] = field(default_factory=list)


class SweepStudy:
    """The study in `<directory>/sweep.sqlite`, locked by this process; `optuna_study` is Optuna's.

    A trial that was running when an earlier process ended is `interrupted`. `identity`, of JSON's types, is what may
    not change while trials are compared. Raises `ConfigError` without Optuna, for a study in use, and for another's.
    """

    def __init__(
        self, sweep: Sweep, directory: Path, *, seed: int, identity: dict[str, Any]
    ) -> None:
        _require_optuna()
        self._sweep = sweep
        self._seed = seed
        self._space = {
            parameter.name: to_distribution(parameter) for parameter in sweep.parameters
        }
        directory.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(directory)
        if lock is None:
            raise ConfigError(
                "name",
                f"another sweep is running in {directory}; give this one another name",
            )
        self._lock = lock
        try:
            self.path = directory / "sweep.sqlite"
            with explained_storage(self.path):
                self.optuna_study = _open_study(sweep, self.path)
                self._check_identity(identity, directory)
        except LockstepError:
            self.close()
            raise
        self.trials = [
            self._read_trial(stored) for stored in self.optuna_study.get_trials()
        ]

    def close(self) -> None:
        self._lock.close()

    def add_trial(self) -> Trial | None:
        """A new trial with values of its own; None if the sweep has no more.

        In a grid and at random the values depend on the seed and the trial's number alone. Bayes learns from the
        trials so far, so what runs at once, and which of it ends first, changes them.
        """
        number = len(self.trials)
        if self._sweep.run_cap is not None and number >= self._sweep.run_cap:
            return None
        if any(self._sweep.is_target_reached(trial.value) for trial in self.trials):
            return None
        if self._sweep.method == "bayes":
            values = self._ask(number)
        else:
            point = self._choose_values(number)
            if point is None:
                return None
            values = point
        self.trials.append(Trial(number, values))
        return self.trials[-1]

    def falls_behind(self, trial: Trial) -> bool:
        """True if a trial has come to a rung and is not among the best there.

        Asynchronous successive halving (Li et al., 2020): no trial waits for another. Optuna gets the best value so
        far, and at the rungs only, because a long run logs thousands.
        """
        hyperband = self._sweep.hyperband
        if hyperband is None:
            return False
        rung = hyperband.min_iter * hyperband.eta**trial.rungs
        while len(trial.curve) >= rung:
            best = best_value(self._sweep, trial.curve[:rung])
            stored = self._find_stored(trial.number)
            stored.report(math.nan if best is None else best, step=rung)
            trial.rungs += 1
            if stored.should_prune():
                return True
            rung *= hyperband.eta
        return False

    def save(self, trial: Trial) -> None:
        """Store what became of a trial. One that is interrupted stays open."""
        outcome = {
            "state": trial.state,
            "value": trial.value,
            "reason": trial.reason,
            "seconds": trial.seconds,
        }
        self._find_stored(trial.number).set_user_attr("outcome", outcome)
        if trial.state in ("done", "stopped") and trial.value is not None:
            # Not as pruned: Optuna would leave a trial that was stopped early out of its plots.
            self.optuna_study.tell(trial.number, trial.value)
        elif trial.state != "interrupted":
            from optuna.trial import TrialState

            self.optuna_study.tell(trial.number, state=TrialState.FAIL)

    def _choose_values(self, number: int) -> Values | None:
        """Store a trial of a grid or at random; returns its values, None after a grid's last."""
        from optuna.trial import TrialState, create_trial

        parameters = self._sweep.parameters
        if self._sweep.method == "random":
            values = {
                parameter.name: parameter.draw(self._seed, number)
                for parameter in parameters
            }
        else:
            point = next(itertools.islice(grid(parameters), number, None), None)
            if point is None:
                return None
            values = point
        params = {
            parameter.name: to_optuna(parameter, values[parameter.name])
            for parameter in parameters
        }
        # In one write: a sweep that is killed here leaves a trial with its values, or none.
        trial = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=self._space,
            user_attrs={"values": values},
        )
        self.optuna_study.add_trial(trial)
        return values

    def _ask(self, number: int) -> Values:
        """Store a trial that Optuna's TPE sampler (Bergstra et al., 2011) proposes; returns its values."""
        import optuna

        # Each trial has a sampler of its own, so that a continued sweep draws what it would have drawn at once.
        seed = key(self._seed, "sweep", number) % 2**32
        self.optuna_study.sampler = optuna.samplers.TPESampler(seed=seed)
        return self._read_values(self.optuna_study.ask(self._space).params)

    def _find_stored(self, number: int) -> optuna.Trial:
        """The trial in Optuna's form that takes reports. After a kill only its id leads there, and that is private."""
        import optuna

        stored = self.optuna_study.get_trials(deepcopy=False)[number]
        return optuna.trial.Trial(self.optuna_study, stored._trial_id)

    def _read_trial(self, stored: optuna.trial.FrozenTrial) -> Trial:
        values = stored.user_attrs.get("values") or self._read_values(stored.params)
        outcome = stored.user_attrs.get("outcome", {"state": "failed"})
        trial = Trial(
            stored.number, values, **outcome, rungs=len(stored.intermediate_values)
        )
        if not stored.state.is_finished():
            trial.state, trial.reason = "interrupted", ""
        return trial

    def _read_values(self, params: dict[str, Any]) -> Values:
        return {
            parameter.name: from_optuna(parameter, params[parameter.name])
            for parameter in self._sweep.parameters
        }

    def _check_identity(self, identity: dict[str, Any], directory: Path) -> None:
        before = self.optuna_study.user_attrs.get("identity")
        if before is None:
            self.optuna_study.set_user_attr("identity", identity)
            return
        changes = [name for name in identity if identity[name] != before.get(name)]
        if changes:
            raise ConfigError(
                "name",
                f"this sweep differs from the one in {directory} in: {', '.join(changes)}; name it otherwise",
            )


def best_value(sweep: Sweep, curve: list[float]) -> float | None:
    """The best finite value of the metric; None if there is none."""
    finite = [value for value in curve if math.isfinite(value)]
    if not finite:
        return None
    return max(finite) if sweep.goal == "maximize" else min(finite)


# ---------------------------------------------------------------- parameters ↔ Optuna


def to_distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """What Optuna draws a parameter from. It knows no normal law and no probabilities; `Parameter.draw` does."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if parameter.choices:
        return CategoricalDistribution(_label_choices(parameter))
    low, high = parameter.range
    if parameter.law == "int_uniform":
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=parameter.law.startswith("log"))


def to_optuna(parameter: Parameter, value: Any) -> Any:
    """A value as Optuna stores it: a number that rounding or a normal law takes out of the range, at its end."""
    if parameter.choices:
        return _label_choices(parameter)[parameter.choices.index(value)]
    low, high = parameter.range
    return min(max(value, low), high)


def from_optuna(parameter: Parameter, value: Any) -> Any:
    """A trial's value of what Optuna proposes."""
    if parameter.choices:
        return parameter.choices[_label_choices(parameter).index(value)]
    return parameter.round(value)


def _label_choices(parameter: Parameter) -> list[Any]:
    """Choices as Optuna takes them: numbers as they are; others (null, lists, True beside 1) as text."""
    if all(type(choice) in (int, float) for choice in parameter.choices):
        return list(parameter.choices)
    return [show(choice) for choice in parameter.choices]


# ---------------------------------------------------------------- the file


def _require_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "sweep",
            "a sweep on this machine needs Optuna: pip install 'lockstep[sweep]'",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _open_study(sweep: Sweep, path: Path) -> optuna.Study:
    """The study in a file, made if there is none. Raises `ConfigError` if the file holds something else."""
    import optuna

    assert sweep.goal is not None, "with_goal comes first"
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if sweep.hyperband is not None:
        min_iter, eta = sweep.hyperband.min_iter, sweep.hyperband.eta
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=min_iter, reduction_factor=eta
        )
    try:
        _refuse_earlier_version(path)
        # Not by URL, in which a "?" or a "{" of the path would be syntax.
        storage = optuna.storages.RDBStorage(
            "sqlite://", engine_kwargs={"creator": lambda: sqlite3.connect(path)}
        )
        return optuna.create_study(
            storage=storage,
            study_name=sweep.name,
            direction=sweep.goal,
            pruner=pruner,
            load_if_exists=True,
        )
    except (sqlite3.OperationalError, OperationalError) as error:
        raise _not_written(path, error) from None
    except (sqlite3.DatabaseError, SQLAlchemyError, RuntimeError) as error:
        raise ConfigError(
            str(path),
            f"cannot be used ({first_line(error)}); move it away, or name this sweep otherwise",
        ) from None


@contextmanager
def explained_storage(path: Path) -> Iterator[None]:
    """A context in which a study that cannot be written any more is a `LockstepError`, not an error of Optuna's."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        # Optuna's own words are a guess at the cause, which it keeps.
        raise _not_written(path, error.__cause__ or error) from None


def _not_written(path: Path, error: BaseException) -> LockstepError:
    return LockstepError(
        f"{path} cannot be written ({first_line(error)}); make room on its disk, or let it be written, and the same "
        f"command goes on with the sweep"
    )


def _refuse_earlier_version(path: Path) -> None:
    """Raise `ConfigError` for the file that sweeps had before they used Optuna: its table `trials` is another."""
    with closing(sqlite3.connect(path)) as connection:
        row = connection.execute(
            "SELECT name FROM sqlite_master WHERE name = 'sweep'"
        ).fetchone()
    if row is not None:
        raise ConfigError(
            str(path),
            "is of a sweep by an earlier version of Lockstep, which this one cannot continue (sweep.html still shows "
            "it); move its directory away, or name this sweep otherwise",
        )
