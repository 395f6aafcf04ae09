"""A step of a run again, on one process, and taken apart."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainer.commands.arguments import split, the_run, whole_number
from trainer.inspection.replay import Replay, replay
from trainer.reporting.figures.images import draw_batch_grid
from trainer.storage.files import write_json
from trainer.storage.run_directory import read_config
from trainer.trainer import Trainer

QUIET = ["wandb.mode=disabled", "run.figures=false", "data.workers=0", "train.compile=false", "batch.fuse=1"]
SHOWN = 12  # lines of a table


def main(arguments: list[str]) -> None:
    """Show step `--step`, the first being 1, and keep it in `RUN/replay/step_…/`; `--json` prints it as one object."""
    given = split(arguments, options=("step",), flags=("json",))
    run, number = the_run(given.paths), whole_number(given.options, "step")
    config = read_config(run, [*QUIET, *given.overrides])
    found = replay(lambda: Trainer(config), run, number)
    directory = run / "replay" / f"step_{found.step:08d}"
    directory.mkdir(parents=True, exist_ok=True)
    images, found.images = found.images, None
    plain = asdict(found)
    write_json(directory / "replay.json", plain)
    if images is not None:
        order = sorted(range(len(images)), key=lambda i: -_number(found.samples[i]["loss"]))
        labels = [_label(found.samples[i]) for i in order]
        draw_batch_grid(images[order], labels, directory / "images.png")
    if "json" in given.options:
        print(json.dumps(plain))
    else:
        _show(found, run, directory)


def _label(sample: dict[str, Any]) -> str:
    return f"{sample['id']} · {sample['target']}" + ("" if sample["loss"] is None else f" · {sample['loss']:.3g}")


def _number(loss: float | None) -> float:
    """A loss to sort by, NaN before all others."""
    return -math.inf if loss is None else math.inf if math.isnan(loss) else loss


def _show(found: Replay, run: Path, directory: Path) -> None:
    console = Console(highlight=False)
    for name, text in _facts(found, run):
        console.print(f"[dim]{name:<10}[/] {text}")
    samples = sorted(found.samples, key=lambda sample: -_number(sample["loss"]))
    console.print(_table("samples, largest loss first", samples))
    console.print(_table("layers' outputs", [{"layer": name, **numbers} for name, numbers in found.layers.items()]))
    if found.batch_norm:
        rows = [{"layer": name, **numbers} for name, numbers in found.batch_norm.items()]
        console.print(_table("what BatchNorm saw: a channel of a micro-batch", rows))
    console.print(_table("weights", [{"parameter": name, **numbers} for name, numbers in found.weights.items()]))
    console.print(f"[dim]files     [/] {directory}: replay.json has every line of these tables")


def _facts(found: Replay, run: Path) -> list[tuple[str, str]]:
    start = f"from the checkpoint of step {found.began_after}" if found.began_after else "from the run's beginning"
    facts = [("replay", f"{run}, step {found.step} in epoch {found.epoch}, {start}")]
    if found.step != found.asked:
        facts.append(("", f"step {found.asked} was asked for; the loss is not finite already in step {found.step}"))
    facts.append(("step", f"loss {found.loss:.6g} · lr {found.learning_rate:g} · gradient norm {found.grad_norm:.6g}"))
    for name, (was, now) in found.logged.items():
        facts.append(("logged", f"{name} {was!r}, and now {now!r}" if was != now else f"{name} {was!r}, the same now"))
    return [*facts, ("digest", _verdict(found))]


def _verdict(found: Replay) -> str:
    """Whether the weights are those that the run had, as far as it logged them."""
    parted = [step for step, (was, now) in found.digests.items() if was != now]
    if not found.digests:
        return "the run logged none between the checkpoint and this step"
    if parted:
        was, now = found.digests[parted[0]]
        return (
            f"parts from the run's at step {parted[0]}: {was}, and now {now}; equal bits on another number of "
            f"processes need run.reproducibility=bitwise"
        )
    here = "this step's too" if found.step in found.digests else f"the last of them step {max(found.digests)}"
    return f"the same as the run's at all {len(found.digests)} logged steps on the way, {here}"


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    """The first rows, numbers to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        numeric = all(isinstance(row.get(name, 0), int | float) for row in rows)
        table.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows[:SHOWN]:
        table.add_row(*(_cell(row.get(name)) for name in names))
    if len(rows) > SHOWN:
        table.caption = f"{len(rows) - SHOWN} more in replay.json"
    return table


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
