"""The lesson that `explain` prints: seven panels, made of the report of `trainer.inspection.explain`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

MAX_WIDTH = 100  # columns
FIRST_ROWS, LAST_ROWS = 6, 4  # of a long table that is cut short
MOST_ROWS = FIRST_ROWS + LAST_ROWS

Report = Mapping[str, Any]
Part = RenderableType
Row = Sequence[str]


def print_lesson(report: Report, most_rows: int | None) -> None:
    """Print the lesson. Tables of more than `most_rows` rows are cut short; None prints every row."""
    width = MAX_WIDTH
    if Console().is_terminal:
        width = min(width, Console().width)
    console = Console(width=width, highlight=False)
    for title, parts in lesson(report, most_rows):
        console.print(Panel(Group(*parts), title=f"[bold]{title}", title_align="left", box=box.ROUNDED, padding=(0, 1)))


def lesson(report: Report, most_rows: int | None) -> Iterator[tuple[str, list[Part]]]:
    """The panels: a title and what stands below it."""
    yield "1 · The batch", _explain_batch(report)
    yield "2 · The loss", [*_explain_step_loss(report, most_rows), _explain_epoch_loss(report)]
    yield "3 · The way back", _explain_graph(report, most_rows)
    yield "4 · The gradients", _explain_gradients(report, most_rows)
    yield "5 · The update", _explain_update(report, most_rows)
    yield "6 · BatchNorm", _explain_batch_norm(report, most_rows)
    yield "7 · Without zero_grad", _explain_zero_grad(report, most_rows)


def _explain_batch(report: Report) -> list[Part]:
    batch = report["batch"]
    sizes = batch["micro_batches"]
    size = f"{max(sizes)}" if min(sizes) == max(sizes) else f"{max(sizes)} or {min(sizes)}"
    model = f"{report['model']}, {_count(report['parameters'], 'parameter')}, {report['precision']}."
    cut = f"{_count(batch['size'], 'sample')}, in {_count(len(sizes), 'micro-batch', 'es')} of {size}."
    parts: list[Part] = [f"{model} The first step takes {cut}"]
    if batch["shape"]:
        shape = " × ".join(map(str, batch["shape"]))
        parts.append(f"A micro-batch reaches the model as {batch['dtype']} {shape}. Its first samples:")
    if "target" in batch["samples"][0]:
        rows = []
        for sample in batch["samples"]:
            output, loss = _first_values(sample["output"]), _number(sample["loss_sum"])
            rows.append((str(sample["id"]), _first_values(sample["target"]), output, loss))
        parts.append(_table(("sample", "target", "model's output", "loss"), rows, None))
    return parts


def _explain_step_loss(report: Report, most_rows: int | None) -> list[Part]:
    loss = report["loss"]
    total = weight = 0.0
    rows = []
    for index, part in enumerate(loss["micro_batches"]):
        total += part["loss_sum"]
        weight += part["weight"]
        rows.append((str(index), _number(part["loss_sum"]), _number(part["weight"]), _number(part["mean"])))
    return [
        f"{loss['name']} gives a sum for each micro-batch. The step divides once, by the weight of all its targets:",
        _table(("micro-batch", "Σ loss", "÷ weight of its targets", "= mean"), rows, most_rows),
        f"the step's loss is {_number(total)} ÷ {_number(weight)} = [bold]{_number(loss['mean'])}[/].",
    ]


def _explain_epoch_loss(report: Report) -> str:
    """Why an epoch's loss is not the mean of its steps' losses."""
    epoch = report["loss"]["epoch"]
    steps, size, last = epoch["steps"], epoch["step_size"], epoch["last_step_size"]
    if last == size:
        composition = f"{_count(steps, 'step')} of {_count(size, 'sample')}. If the last step were shorter, a"
        often = "too often"
    else:
        composition = f"{_count(steps - 1, 'step')} of {_count(size, 'sample')} and one of {last}. A"
        often = f"{size / last:.3g} times"
    return (
        f"\nAn epoch is {composition} mean of the steps' means would count each sample of the last one {often}; so "
        f"each is weighted by its step's size: Σ loss ÷ Σ weight over the epoch."
    )


def _explain_graph(report: Report, most_rows: int | None) -> list[Part]:
    rows = []
    for index, node in enumerate(report["chain"]):
        name = node["name"].removeprefix("torch::autograd::")
        rows.append((str(index), name, ", ".join(node["parameters"])))
    if most_rows is not None:
        most_rows += FIRST_ROWS  # one layer takes several nodes
    return [
        f"backward() goes from the loss to the first layer, {len(rows)} nodes on the longest path:",
        _table(("", "autograd node", "gives the gradient of"), rows, most_rows, align_right=False),
    ]


def _explain_gradients(report: Report, most_rows: int | None) -> list[Part]:
    rows = []
    for name, stages in report["gradients"].items():
        norms = [_norm(stages[stage]) for stage in ("before", "after_first", "after_last", "reduced")]
        rows.append((name, *norms))
    count = _count(len(report["batch"]["micro_batches"]), "micro-batch", "es")
    parts: list[Part] = [
        f"Norms before backward, after the first and the last of {count}, and as the optimizer receives them: "
        f"divided by the step's weight, summed over processes, clipped. None is no gradient yet; a backward adds to "
        f"what is there.",
        _table(("parameter", "before", "after the first", "after the last", "reduced"), rows, most_rows),
    ]
    if report["reproducibility"] == "bitwise":
        parts.append(
            "bitwise: each micro-batch's gradient is taken away and added up in a fixed order, so here none adds up."
        )
    if report["gradient_scale"] != 1:
        parts.append(f"fp16: before the reduction, gradients are multiplied by {report['gradient_scale']:g}.")
    norm, most = report["grad_norm"], report["max_grad_norm"]
    clipping = ""
    if most is not None:
        clipping = f", clipped to {most:g}" if norm > most else f", under {most:g}"
    parts.append(f"The whole gradient's norm is [bold]{_number(norm)}[/]{clipping}.")
    return parts


def _explain_update(report: Report, most_rows: int | None) -> list[Part]:
    rows = []
    for name, update in report["updates"].items():
        gradient = _norm(report["gradients"][name]["reduced"])
        change, relative = _number(update["norm"]), _number(update["relative"])
        rows.append((name, gradient, change, relative, _first_values(update["first"][:3])))
    headings = ("parameter", "gradient", "change", "change ÷ weight", "first values of the change")
    return [
        f"{report['optimizer']} with learning rate {report['lr']:g}; norms of the gradients and of what they changed:",
        _table(headings, rows, most_rows),
    ]


def _explain_batch_norm(report: Report, most_rows: int | None) -> list[Part]:
    section = report["batch_norm"]
    if not section["layers"]:
        return ["No layer keeps running statistics."]
    rows = []
    for name, stages in section["layers"].items():
        cells = []
        for stage in ("before", "after_first", "after"):
            # A layer that the first micro-batch did not reach has no values after it.
            statistics = stages.get(stage, stages["before"])
            mean, variance = (_number(statistics[kind]["first"][0]) for kind in ("mean", "var"))
            cells.append(f"{mean}\n{variance}")
        rows.append((name, "mean\nvar", *cells))
    last = next(iter(section["layers"].values()))["after"]
    return [
        f"Each of the {section['micro_batches']} micro-batches is normalised by its own statistics s, and moves the "
        f"running ones: r ← (1 − m) r + m s, with m = {last['momentum']:.4g} "
        f"(batch_norm.momentum_per={section['momentum_per']}). After the step {last['batches']} are counted.",
        _table(("layer, channel 0", "", "before", "after the first", "after the step"), rows, most_rows),
    ]


def _explain_zero_grad(report: Report, most_rows: int | None) -> list[Part]:
    if report["without_zero_grad"] is None:
        return ["This run has one step, so nothing would be left over for a second."]
    rows = []
    for name, steps in report["without_zero_grad"].items():
        rows.append((name, _norm(steps["first"]), _norm(steps["second"]), _norm(steps["both"])))
    return [
        "zero_grad sets each gradient to None after the update. Were it forgotten, the second step's backward would "
        "add to the first one's gradient, and the optimizer would take both for one:",
        _table(("parameter", "step 1", "step 2", "step 2 without zero_grad"), rows, most_rows),
    ]


def _table(headings: Row, rows: Sequence[Row], most_rows: int | None, *, align_right: bool = True) -> Table:
    """A table; of more than `most_rows` rows the first and the last, and between them how many are left out.

    `align_right` is for the numbers in all columns but the first.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if align_right and index else "left", overflow="fold")
    if most_rows is None or len(rows) <= most_rows:
        first, last = rows, rows[:0]
    else:
        first, last = rows[: most_rows - LAST_ROWS], rows[-LAST_ROWS:]
    for row in first:
        table.add_row(*row)
    if last:
        table.add_row(Text(f"… {len(rows) - len(first) - len(last)} more (--all)", "dim"))
    for row in last:
        table.add_row(*row)
    return table


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{plural}"


def _norm(values: Mapping[str, Any] | None) -> str:
    return "None" if values is None else _number(values["norm"])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _first_values(value: Any) -> str:
    """A number, or the first four of a list."""
    if isinstance(value, list):
        text = " ".join(f"{number:.2g}" for number in value[:4])
        return f"{text} …" if len(value) > 4 else text
    return _number(value) if isinstance(value, float) else str(value)
