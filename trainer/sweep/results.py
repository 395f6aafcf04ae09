"""What a sweep came to: a table of its best trials, Optuna's pictures, and one HTML page."""

from __future__ import annotations

import base64
import shlex
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.secrets import REDACTED, redacted_value
from trainer.reporting.figures.style import write
from trainer.reporting.plain_text import plain_console
from trainer.storage.files import write_text
from trainer.sweep.description import Sweep
from trainer.sweep.same_data import describe_other_data
from trainer.sweep.study import SweepStudy, Trial
from trainer.sweep.table import (
    build_table,
    list_cells,
    list_headings,
    list_varying,
    sort_trials,
)

if TYPE_CHECKING:
    import optuna

PRINTED_TRIALS = 10
MIN_IMPORTANCE_VALUES = 3  # distinct ones; from fewer, an importance would be chance
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;color:#262626;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #e4e4e4}}
img{{max-width:100%}}</style>
<h1>{title}</h1><p>{summary}</p>{pictures}<table>{rows}</table></html>
"""


def write_results(sweep: Sweep, study: SweepStudy, directory: Path) -> None:
    """Print the best trials; write the pictures (`trials.png`, `history.png`, `importance.png`) and `sweep.html`."""
    order = sort_trials(sweep, study.trials)
    table = build_table(sweep, order[:PRINTED_TRIALS])
    plain_console().print(table, soft_wrap=True)
    other_data = describe_other_data(sweep, directory)
    if other_data:
        print(f"note  {other_data}")
    pictures = draw_pictures(sweep, study.optuna_study, directory)
    write_text(directory / "sweep.html", _build_page(sweep, order, pictures))
    print(f"\n{_summarize(sweep, order)}\nfiles  {directory / 'sweep.html'}")
    if any(directory.glob("*/wandb/offline-run-*")):
        print(f"to W&B  python -m trainer sync {shlex.quote(str(directory))}")


def draw_pictures(sweep: Sweep, study: optuna.Study, directory: Path) -> list[Path]:
    """Draw history, parallel coordinates and importances of the trials that have a value; returns the files."""
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as plots

    # A picture of secrets would be their list.
    names = []
    for name in list_varying(sweep):
        if redacted_value(name, "") != REDACTED:
            names.append(name)
    complete = study.get_trials(states=[TrialState.COMPLETE])
    values = {trial.value for trial in complete}
    width = max(6.4, 1.3 * (len(names) + 1))  # inches, for the parallel axes
    pictures: dict[str, Callable[..., object]] = {}
    if values:
        pictures["history"] = plots.plot_optimization_history
    if values and names:
        pictures["trials"] = partial(plots.plot_parallel_coordinate, params=names)
    if len(values) >= MIN_IMPORTANCE_VALUES and names:
        fanova = FanovaImportanceEvaluator(seed=0)
        pictures["importance"] = partial(
            plots.plot_param_importances, evaluator=fanova, params=names
        )
    paths = [directory / f"{name}.png" for name in pictures]
    for path, plot in zip(paths, pictures.values(), strict=True):
        _draw(path, width, partial(plot, study, target_name=sweep.metric))
    return paths


def _draw(path: Path, width: float, plot: Callable[[], object]) -> None:
    """Write what one of Optuna's functions plots."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")  # files only: no window, and no display needed
    # The context restores what the functions change for the whole process.
    with plt.rc_context({"figure.figsize": (width, 4.8)}), warnings.catch_warnings():
        # Of functions that are experimental, and of axes that one value gives no length.
        warnings.simplefilter("ignore")
        plot()
        write(plt.gcf(), path, cropped=True)
        plt.close()


def _summarize(sweep: Sweep, trials: list[Trial]) -> str:
    counts = Counter(trial.state for trial in trials)
    counts["interrupted"] += counts.pop("running", 0)
    states = [
        f"{counts[state]} {state}"
        for state in ("done", "stopped", "failed", "interrupted")
        if counts[state]
    ]
    return f"{len(trials)} trials: {', '.join(states) or 'none'}; {sweep.goal} {sweep.metric}"


def _build_page(sweep: Sweep, order: list[Trial], pictures: list[Path]) -> str:
    """The page as one file, its pictures within."""
    images = []
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        images.append(f'<p><img alt="{path.stem}" src="data:image/png;base64,{data}">')
    rows = [_build_row("th", [*list_headings(sweep), ""])]
    for trial in order:
        rows.append(_build_row("td", [*list_cells(sweep, trial), trial.reason]))
    return PAGE.format(
        title=escape(sweep.name),
        summary=escape(_summarize(sweep, order)),
        pictures="".join(images),
        rows="".join(rows),
    )


def _build_row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}" for cell in cells)
