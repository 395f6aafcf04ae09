"""A sweep's pictures: each trial as a line across its values, and how much each parameter tells of the metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.reporting.figures.style import BLUE, GREY, INK, SMALL, TEXT, new_figure, write
from trainer.sweep.description import Sweep
from trainer.sweep.search import distributions, make_study
from trainer.sweep.space import Parameter
from trainer.sweep.store import Trial
from trainer.sweep.table import show_value, varying

LEAST_TRIALS = 3  # with a value, for an importance

Floats = npt.NDArray[np.float64]


def parallel_coordinates(sweep: Sweep, trials: list[Trial], path: Path) -> None:
    """An axis for each parameter and one for the metric; a line for each trial with a value, the best ones darkest."""
    names = varying(sweep)
    ended = [trial for trial in trials if trial.value is not None]
    values = np.array([trial.value for trial in ended], dtype=float)
    figure = new_figure(max(4.5, 1.6 * (len(names) + 1)), 3.6)
    axes = figure.subplots()
    columns = [_axis([trial.values[name] for trial in ended]) for name in names] + [_axis(list(values))]
    rank = _ranks(values if sweep.goal == "maximize" else -values) / max(1, len(ended) - 1)
    for i in np.argsort(rank):
        heights = [heights[i] for heights, _ in columns]
        best = rank[i] == 1 or len(ended) == 1
        width, alpha = (2.2, 1.0) if best else (1.1, 0.15 + 0.55 * rank[i])
        axes.plot(range(len(columns)), heights, color=BLUE, linewidth=width, alpha=alpha, solid_capstyle="round")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for place, (_, ticks) in enumerate(columns):
        axes.axvline(place, color=GREY, linewidth=0.8, zorder=0)
        for height, label in ticks:
            axes.text(place + 0.03, height, label, fontsize=SMALL, color=INK, va="center", parse_math=False, bbox=box)
    axes.set_xticks(range(len(columns)), [*names, sweep.metric], fontsize=TEXT, color=INK, parse_math=False)
    axes.set_xlim(-0.1, len(columns) - 0.6)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    write(figure, path)


def importances(sweep: Sweep, trials: list[Trial]) -> tuple[str, dict[str, float]]:
    """How it was measured, and each varying parameter's share: Optuna's where installed, else rank correlation."""
    ended = [trial for trial in trials if trial.value is not None and trial.state in ("done", "stopped")]
    parameters = [parameter for parameter in sweep.parameters if len(parameter.choices) != 1]
    if len(ended) < LEAST_TRIALS or len({trial.value for trial in ended}) == 1:
        return "", {}
    try:
        import optuna
    except ImportError:
        values = np.array([trial.value for trial in ended], dtype=float)
        return "rank correlation, absolute", {
            p.name: _association(p, [trial.values[p.name] for trial in ended], values) for p in parameters
        }
    study = make_study(sweep, distributions(sweep.parameters), ended, 0)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return "share of the variance, fANOVA", dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def importance_bars(method: str, shares: dict[str, float], path: Path) -> None:
    """A bar for each parameter, the longest at the top."""
    names = sorted(shares, key=lambda name: shares[name])
    figure = new_figure(6.0, 0.9 + 0.35 * len(names))
    axes = figure.subplots()
    axes.barh(range(len(names)), [shares[name] for name in names], color=BLUE, height=0.6)
    axes.set_yticks(range(len(names)), names, fontsize=TEXT, color=INK, parse_math=False)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlim(0, 1)
    axes.set_xlabel(method, fontsize=TEXT, color=INK)
    write(figure, path)


def _axis(values: list[Any]) -> tuple[Floats, list[tuple[float, str]]]:
    """Heights in [0, 1] of values, and labelled ticks: by size, by magnitude where that spans tens, else by place."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        labels = sorted({show_value(value) for value in values})
        places = {label: i / max(1, len(labels) - 1) for i, label in enumerate(labels)}
        return np.array([places[show_value(value)] for value in values]), [(places[name], name) for name in labels]
    numbers = np.array(values, dtype=float)
    scaled = np.log(numbers) if len(numbers) and numbers.min() > 0 and numbers.max() > 20 * numbers.min() else numbers
    span = np.ptp(scaled) if len(scaled) else 0.0
    heights = (scaled - scaled.min()) / span if span else np.full(len(scaled), 0.5)
    distinct = dict(zip(numbers.tolist(), heights.tolist(), strict=True))
    kept = distinct if len(distinct) <= 6 else {n: distinct[n] for n in (numbers.min().item(), numbers.max().item())}
    return heights, [(height, f"{number:.4g}") for number, height in kept.items()]


def _association(parameter: Parameter, given: list[Any], values: Floats) -> float:
    """|Spearman's correlation| with a number; with choices that are none, the correlation ratio of the ranks."""
    ranks = _ranks(values)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        numbers = _ranks(np.array(given, dtype=float))
        return abs(float(np.corrcoef(numbers, ranks)[0, 1])) if np.ptp(numbers) else 0.0
    labels = np.array([show_value(value) for value in given])
    means = np.array([ranks[labels == label].mean() for label in labels])
    return float(means.std() / ranks.std()) if ranks.std() else 0.0


def _ranks(values: Floats) -> Floats:
    """0 for the least; equal values share the mean of their ranks."""
    below = (values[:, None] > values).sum(1)
    ranks: Floats = below + ((values[:, None] == values).sum(1) - 1) / 2
    return ranks
