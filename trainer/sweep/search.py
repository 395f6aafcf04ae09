"""Which values the next trial gets, and which trial is stopped early. Only bayes needs Optuna."""

from __future__ import annotations

import itertools
import math
from typing import Any

from trainer.errors import ConfigError
from trainer.exact.seeding import key
from trainer.sweep.description import Hyperband, Sweep
from trainer.sweep.space import Parameter, Values, grid
from trainer.sweep.store import Trial


def next_values(sweep: Sweep, seed: int, trials: list[Trial]) -> Values | None:
    """The values of trial `len(trials)`, or None where there are no more.

    Of a grid and at random they depend on the seed and the trial's number alone; bayes draws on the `trials` so far,
    so what runs at once, and which of it ends first, changes them.
    """
    number = len(trials)
    if sweep.run_cap is not None and number >= sweep.run_cap:
        return None
    if any(trial.value is not None and sweep.has_reached(trial.value) for trial in trials):
        return None
    if sweep.method == "grid":
        return next(itertools.islice(grid(sweep.parameters), number, None), None)
    if sweep.method == "random":
        return {parameter.name: parameter.draw(seed, number) for parameter in sweep.parameters}
    space = distributions(sweep.parameters)
    asked = make_study(sweep, space, trials, key(seed, "sweep", number) % 2**32).ask(space).params
    return {p.name: from_optuna(p, asked[p.name]) if p.name in asked else p.extremes()[0] for p in sweep.parameters}


def rungs_reached(band: Hyperband, values: int) -> int:
    """How many times a trial that has logged so many values of the metric was to be judged."""
    return 0 if values < band.least else 1 + int(math.log(values / band.least, band.rate) + 1e-9)


def should_stop(sweep: Sweep, band: Hyperband, trial: Trial, trials: list[Trial]) -> bool:
    """Whether, at the last rung it reached, a trial is not among the best `1/rate` of those that came as far.

    Asynchronous successive halving (Li et al., 2020): nobody waits, and the first to reach a rung goes on.
    """
    rung = band.least * band.rate ** (rungs_reached(band, len(trial.curve)) - 1)
    sign = 1 if sweep.goal == "maximize" else -1
    mine = best(trial.curve[:rung], sign)
    reached = [t for t in trials if len(t.curve) >= rung]
    ahead = sum(best(t.curve[:rung], sign) > mine for t in reached if t.number != trial.number)
    return ahead >= max(1, len(reached) // band.rate)


def best(curve: list[float], sign: int) -> float:
    """The greatest finite value, of a metric to be minimised with its sign changed."""
    return max((sign * value for value in curve if math.isfinite(value)), default=-math.inf)


# ---------------------------------------------------------------- Optuna


def make_study(sweep: Sweep, space: dict[str, Any], trials: list[Trial], seed: int) -> Any:
    """An Optuna study in memory of the trials so far, for a TPE sampler (Bergstra et al., 2011).

    It is made anew for each question, so that the sweep's own file is all there is to keep.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = optuna.trial.TrialState
    study = optuna.create_study(direction=sweep.goal, sampler=optuna.samplers.TPESampler(seed=seed))
    for trial in trials:
        value = trial.value if trial.state in ("done", "stopped") else None
        state = states.COMPLETE if value is not None else states.FAIL if trial.state == "failed" else states.RUNNING
        params = {p.name: to_optuna(p, trial.values[p.name]) for p in sweep.parameters if p.name in space}
        study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=space, value=value))
    return study


def distributions(parameters: list[Parameter]) -> dict[str, Any]:
    """Optuna's distributions of the parameters that vary; choices go by their place, as they may be of any type."""
    known = _optuna().distributions
    found: dict[str, Any] = {}
    for parameter in parameters:
        low, high = parameter.span
        if parameter.choices:
            found[parameter.name] = known.CategoricalDistribution(range(len(parameter.choices)))
        elif parameter.base == "int_uniform":
            found[parameter.name] = known.IntDistribution(int(low), int(high))
        else:
            found[parameter.name] = known.FloatDistribution(low, high, log=parameter.base.startswith("log"))
    return {name: found[name] for name in found if not found[name].single()}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "method", "bayes needs Optuna: pip install 'lockstep[sweep]', or use grid or random"
        ) from None
    return optuna


def to_optuna(parameter: Parameter, value: Any) -> Any:
    """A value as Optuna knows it: inside the bounds, which rounding may have left."""
    if parameter.choices:
        return parameter.choices.index(value)
    low, high = parameter.span
    return min(max(value, low), high)


def from_optuna(parameter: Parameter, value: Any) -> Any:
    if parameter.choices:
        return parameter.choices[value]
    return value if parameter.base == "int_uniform" else parameter.rounded(value)
