"""Which weights the evaluations of a run are of, and which the best model has: those trained, or their average."""

from __future__ import annotations

from trainer.config.run_sections import EmaConfig
from trainer.config.schema import Config


def evaluated_phases(section: EmaConfig) -> dict[str, bool]:
    """The evaluations of a run, by the first part of their columns: whether each is of the average."""
    if section.decay is None or section.evaluate == "none":
        return {"val": False}
    if section.evaluate == "instead":
        return {"val": True}
    return {"val": False, "val_ema": True}


def evaluated_phase(phase: str, evaluation: str) -> str:
    """The phase of a set in an evaluation: `val_ema/clean` of `val/clean` in that of the average, `val_ema`."""
    name, slash, rest = phase.partition("/")
    return f"{evaluation if name == 'val' else name}{slash}{rest}"


def logged_phases(section: EmaConfig, validation: list[str]) -> list[str]:
    """The phases of all evaluations of validation sets, `validation` by theirs."""
    phases = []
    for evaluation in evaluated_phases(section):
        phases += [evaluated_phase(phase, evaluation) for phase in validation]
    return phases


def best_evaluation(config: Config) -> str:
    """The evaluation that the best model had, `val` or `val_ema`."""
    return "val_ema" if config.best.metric.startswith("val_ema/") else "val"


def best_is_average(config: Config) -> bool:
    """True if `best/` holds the average, because `best.metric` is measured with it."""
    phase = config.best.metric.partition("/")[0]
    return evaluated_phases(config.ema).get(phase, False)


def describe_average(config: Config) -> str:
    """One line for the header of a run; "" without an average."""
    section = config.ema
    if section.decay is None:
        return ""
    decay = f"decay {section.decay:g}"
    if section.warmup:
        decay = f"decay min({section.decay:g}, (1 + n) / (10 + n))"
    every = "step" if section.every == 1 else f"{section.every} steps"
    since = f" after step {section.start}" if section.start else ""
    evaluated = {
        "beside": "evaluated as val_ema/…",
        "instead": "val/… is its evaluation",
        "none": "not evaluated",
    }
    kept = " · kept as best" if best_is_average(config) else ""
    return f"{decay} · every {every}{since} · {evaluated[section.evaluate]}{kept}"
