"""One step of a config taken apart: batch, loss, graph, gradients, update, BatchNorm; as a lesson, or as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trainer.commands.arguments import split, the_config
from trainer.errors import ConfigError
from trainer.inspection.explain import Dissection

WIDTH = 100  # columns, at most
FIRST, LAST = 6, 4  # rows of a long table that are shown
STAGES = ("before", "after_first", "after_last", "reduced")
Report = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Explain the first step of a config. Trains two steps in memory and writes nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("explain", "takes a step apart on one process; start it without a launcher")
    given = split(arguments, flags=("json", "all"))
    report = Dissection(the_config(given)).report()
    if "json" in given.options:
        print(json.dumps(report))
        return
    show(report, rows=None if "all" in given.options else FIRST + LAST)


def show(report: Report, rows: int | None) -> None:
    """Print the lesson; of long tables, `rows` rows."""
    console = Console(width=min(WIDTH, Console().width) if Console().is_terminal else WIDTH, highlight=False)
    for title, parts in lesson(report, rows):
        console.print(Panel(Group(*parts), title=f"[bold]{title}", title_align="left", box=box.ROUNDED, padding=(0, 1)))


def lesson(report: Report, rows: int | None) -> Iterator[tuple[str, list[RenderableType]]]:
    """The lesson's panels: a title and what stands below it."""
    yield "1 · The batch", _batch(report)
    yield "2 · The loss", _loss(report, rows)
    yield "3 · The way back", _chain(report, rows)
    yield "4 · The gradients", _gradients(report, rows)
    yield "5 · The update", _update(report, rows)
    yield "6 · BatchNorm", _batch_norm(report, rows)
    yield "7 · Without zero_grad", _without_zero_grad(report, rows)


def _batch(report: Report) -> list[RenderableType]:
    batch = report["batch"]
    sizes = batch["micro_batches"]
    parts: list[RenderableType] = [
        f"{report['model']}, {_count(report['parameters'], 'parameter')}, {report['precision']}. The first step takes "
        f"{_count(batch['size'], 'sample')}, in {_count(len(sizes), 'micro-batch', 'es')} of {_range(sizes)}.",
    ]
    if batch["shape"]:
        shape = " × ".join(map(str, batch["shape"]))
        parts.append(f"A micro-batch reaches the model as {batch['dtype']} {shape}. Its first samples:")
    if "target" in batch["samples"][0]:
        table = _table("sample", "target", "model's output", "loss")
        for sample in batch["samples"]:
            table.add_row(
                str(sample["id"]), _few(sample["target"]), _few(sample["output"]), _number(sample["loss_sum"])
            )
        parts.append(table)
    return parts


def _loss(report: Report, rows: int | None) -> list[RenderableType]:
    loss, epoch = report["loss"], report["loss"]["epoch"]
    parts: list[RenderableType] = []
    table = _table("micro-batch", "Σ loss", "÷ weight of its targets", "= mean")
    for index, part in _cut(list(enumerate(loss["micro_batches"])), table, rows):
        table.add_row(str(index), *(_number(part[name]) for name in ("loss_sum", "weight", "mean")))
    total, weight = (sum(part[name] for part in loss["micro_batches"]) for name in ("loss_sum", "weight"))
    parts += [
        f"{loss['name']} gives a sum for each micro-batch. The step divides once, by the weight of all its targets:",
        table,
        f"the step's loss is {_number(total)} ÷ {_number(weight)} = [bold]{_number(loss['mean'])}[/].",
    ]
    size, last = epoch["step_size"], epoch["last_step_size"]
    steps = _count(epoch["steps"] - (last != size), "step")
    rest = f" and one of {last}. " if last != size else ". Say the last were shorter: "
    times = f"{size / last:.3g} times" if last != size else "too often"
    parts.append(
        f"\nAn epoch is {steps} of {_count(size, 'sample')}{rest}A mean of the steps' means would count each sample of "
        f"the last one {times}; so each is weighted by its step's size: Σ loss ÷ Σ weight over the epoch."
    )
    return parts


def _chain(report: Report, rows: int | None) -> list[RenderableType]:
    nodes = report["chain"]
    table = _table("", "autograd node", "gives the gradient of", numbers=False)
    for index, node in _cut(list(enumerate(nodes)), table, None if rows is None else rows + FIRST):
        table.add_row(str(index), node["name"].removeprefix("torch::autograd::"), ", ".join(node["parameters"]))
    return [f"backward() goes from the loss to the first layer, {len(nodes)} nodes on the longest path:", table]


def _gradients(report: Report, rows: int | None) -> list[RenderableType]:
    cuts = len(report["batch"]["micro_batches"])
    table = _table("parameter", "before", "after the first", "after the last", "reduced")
    for name, stages in _cut(list(report["gradients"].items()), table, rows):
        table.add_row(name, *(_norm(stages[stage]) for stage in STAGES))
    parts: list[RenderableType] = [
        f"Norms before backward, after the first and the last of {_count(cuts, 'micro-batch', 'es')}, and as "
        f"the optimizer receives them: divided by the step's weight, summed over processes, clipped. None is no "
        f"gradient yet; a backward adds to what is there.",
        table,
    ]
    if report["reproducibility"] == "bitwise":
        parts.append("bitwise: each micro-batch's gradient is taken away as a leaf of a fixed tree, so none adds up.")
    if report["gradient_scale"] != 1:
        parts.append(f"fp16: up to the reduction they stand times the scaler's {report['gradient_scale']:g}.")
    clip = report["max_grad_norm"]
    done = "" if clip is None else f", clipped to {clip:g}" if report["grad_norm"] > clip else f", under {clip:g}"
    return [*parts, f"The whole gradient's norm is [bold]{_number(report['grad_norm'])}[/]{done}."]


def _update(report: Report, rows: int | None) -> list[RenderableType]:
    table = _table("parameter", "gradient", "change", "change ÷ weight", "first values of the change")
    for name, update in _cut(list(report["updates"].items()), table, rows):
        table.add_row(
            name,
            _norm(report["gradients"][name]["reduced"]),
            _number(update["norm"]),
            _number(update["relative"]),
            _few(update["first"][:3]),
        )
    return [f"{report['optimizer']} with learning rate {report['lr']:g}; norms of what it made of the gradient:", table]


def _batch_norm(report: Report, rows: int | None) -> list[RenderableType]:
    section = report["batch_norm"]
    if not section["layers"]:
        return ["No layer keeps running statistics."]
    table = _table("layer, channel 0", "", "before", "after the first", "after the step")
    for name, stages in _cut(list(section["layers"].items()), table, rows):
        for kind in ("mean", "var"):
            numbers = (stages.get(stage, stages["before"]) for stage in ("before", "after_first", "after"))
            table.add_row(name if kind == "mean" else "", kind, *(_number(n[kind]["first"][0]) for n in numbers))
    last = next(iter(section["layers"].values()))["after"]
    return [
        f"Each of the {section['micro_batches']} micro-batches is normalised by its own statistics s, and moves the "
        f"running ones: r ← (1 − m) r + m s, with m = {last['momentum']:.4g} "
        f"(batch_norm.momentum_per={section['momentum_per']}). After the step {last['batches']} are counted.",
        table,
    ]


def _without_zero_grad(report: Report, rows: int | None) -> list[RenderableType]:
    if report["without_zero_grad"] is None:
        return ["This run has one step, so nothing would be left over for a second."]
    table = _table("parameter", "step 1", "step 2", "step 2 without zero_grad")
    for name, steps in _cut(list(report["without_zero_grad"].items()), table, rows):
        table.add_row(name, *(_norm(steps[step]) for step in ("first", "second", "both")))
    return [
        "zero_grad sets each gradient to None after the update. Were it forgotten, the second step's backward would "
        "add to the first one's gradient, and the optimizer would take both for one:",
        table,
    ]


def _table(*headings: str, numbers: bool = True) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if numbers and index else "left", overflow="fold")
    return table


def _cut(items: Sequence[Any], table: Table, rows: int | None) -> Iterator[Any]:
    """The items; of more than `rows`, the first and last, a row between them that says how many are left out."""
    if rows is None or len(items) <= rows:
        yield from items
        return
    yield from items[: rows - LAST]
    table.add_row(Text(f"… {len(items) - rows} more (--all)", "dim"))
    yield from items[-LAST:]


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number:,} {thing}{plural if number != 1 else ''}"


def _norm(values: Any) -> str:
    return "None" if values is None else _number(values["norm"])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _few(value: Any) -> str:
    """A number, or the first of many."""
    if not isinstance(value, list):
        return _number(value) if isinstance(value, float) else str(value)
    return " ".join(f"{v:.2g}" for v in value[:4]) + (" …" if len(value) > 4 else "")


def _range(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if min(sizes) == max(sizes) else f"{max(sizes)} or {min(sizes)}"
