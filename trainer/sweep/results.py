"""What a sweep came to: a table of the best, two pictures, one HTML page, and how to send its runs to W&B."""

from __future__ import annotations

import base64
import shlex
from html import escape
from pathlib import Path

from rich.console import Console

from trainer.storage.files import write_text
from trainer.sweep.description import Sweep
from trainer.sweep.pictures import importance_bars, importances, parallel_coordinates
from trainer.sweep.store import Trial
from trainer.sweep.table import ranked, show_value, shown, table, varying

BEST = 10
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;color:#262626;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #e4e4e4}}
img{{max-width:100%}}</style>
<h1>{title}</h1><p>{facts}</p>{pictures}<table><tr>{heading}</tr>{rows}</table></html>
"""


def write_results(sweep: Sweep, trials: list[Trial], directory: Path) -> None:
    """Print the best trials; write `trials.png`, `importance.png` and `sweep.html`."""
    console = Console(force_jupyter=False, soft_wrap=True)
    order = ranked(sweep, trials)
    ended = [trial for trial in trials if trial.value is not None]
    console.print(table(sweep, order[:BEST]))
    pictures = []
    if ended:
        parallel_coordinates(sweep, trials, directory / "trials.png")
        pictures.append(directory / "trials.png")
    method, shares = importances(sweep, trials)
    if shares:
        importance_bars(method, shares, directory / "importance.png")
        pictures.append(directory / "importance.png")
    write_text(directory / "sweep.html", _page(sweep, order, pictures))
    print(f"\n{_facts(sweep, trials)}\nfiles  {directory / 'sweep.html'}")
    if any(directory.glob("*/wandb/offline-run-*")):
        print(f"to W&B  python -m trainer sync {shlex.quote(str(directory))}")


def _facts(sweep: Sweep, trials: list[Trial]) -> str:
    counts = {state: sum(trial.state == state for trial in trials) for state in ("done", "stopped", "failed")}
    left = len(trials) - sum(counts.values())
    said = [f"{count} {state}" for state, count in {**counts, "interrupted": left}.items() if count]
    return f"{len(trials)} trials: {', '.join(said) or 'none'}; {sweep.goal} {sweep.metric}"


def _end(trial: Trial) -> tuple[str, str]:
    return f"{trial.seconds:.0f}", trial.reason


def _page(sweep: Sweep, order: list[Trial], pictures: list[Path]) -> str:
    """All in one file: the pictures are within."""
    names = varying(sweep)
    images = "".join(
        f'<p><img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    heading = ("trial", "state", sweep.metric, *names, "seconds", "")
    rows = [
        (trial.number, trial.state, shown(trial), *(show_value(trial.values[n]) for n in names), *_end(trial))
        for trial in order
    ]
    return PAGE.format(
        title=escape(sweep.name),
        facts=escape(_facts(sweep, order)),
        pictures=images,
        heading="".join(f"<th>{escape(name)}" for name in heading),
        rows="".join("<tr>" + "".join(f"<td>{escape(str(cell))}" for cell in row) for row in rows),
    )
