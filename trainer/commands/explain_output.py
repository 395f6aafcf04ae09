"""The lesson that `explain` prints: seven panels, made of the report of `trainer.inspection.explain`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trainer.commands.tables import Row, add_rows, format_cell, make_table
from trainer.reporting.plain_text import plain_console

MAX_WIDTH = 100  # columns
FIRST_ROWS, LAST_ROWS = 6, 4  # of a long table that is cut short
MOST_ROWS = FIRST_ROWS + LAST_ROWS
MOST_VALUES = 4  # of a list

Report = Mapping[str, Any]
Part = RenderableType


def print_lesson(report: Report, most_rows: int | None) -> None:
    """Print the lesson. Tables of more than `most_rows` rows are cut short; None prints every row."""
    terminal = plain_console()
    width = MAX_WIDTH
    if terminal.is_terminal:
        width = min(width, terminal.width)
    console = plain_console(width=width)
    for title, parts in lesson(report, most_rows):
        console.print(
            Panel(
                Group(*parts),
                title=Text(title, "bold"),
                title_align="left",
                box=box.ROUNDED,
                padding=(0, 1),
            )
        )


def lesson(report: Report, most_rows: int | None) -> Iterator[tuple[str, list[Part]]]:
    """The panels: a title and what stands below it."""
    yield "1 · The batch", _explain_batch(report)
    yield "2 · The loss", _explain_loss(report, most_rows)
    yield "3 · The way back", _explain_graph(report["chain"], most_rows)
    yield "4 · The gradients", _explain_gradients(report, most_rows)
    yield "5 · The update", _explain_update(report, most_rows)
    yield "6 · BatchNorm", _explain_batch_norm(report["batch_norm"], most_rows)
    yield (
        "7 · Without zero_grad",
        _explain_zero_grad(report["without_zero_grad"], most_rows),
    )


def _explain_batch(report: Report) -> list[Part]:
    batch = report["batch"]
    samples = batch["samples"]
    model = f"{report['model']}, {_count(report['parameters'], 'parameter')}, {report['precision']}."
    size = _count(batch["size"], "sample")
    parts: list[Part] = [
        f"{model} The first step takes {size}, in {_describe_sizes(batch['micro_batches'])}."
    ]
    if batch["shape"]:
        shape = " × ".join(map(str, batch["shape"]))
        parts.append(
            f"A micro-batch reaches the model as {batch['dtype']} {shape}. Its first samples:"
        )
    if "target" in samples[0]:
        rows = []
        for sample in samples:
            target, output = (
                _first_values(sample["target"]),
                _first_values(sample["output"]),
            )
            rows.append((sample["id"], target, output, sample["loss_sum"]))
        parts.append(_table(("sample", "target", "model's output", "loss"), rows, None))
    return parts


def _describe_sizes(sizes: Sequence[int]) -> str:
    largest, smallest = max(sizes), min(sizes)
    count = _count(len(sizes), "micro-batch", "es")
    return (
        f"{count} of {largest}"
        if largest == smallest
        else f"{count} of {largest} or {smallest}"
    )


def _explain_loss(report: Report, most_rows: int | None) -> list[Part]:
    loss = report["loss"]
    total = weight = 0.0
    rows = []
    for index, part in enumerate(loss["micro_batches"]):
        total += part["loss_sum"]
        weight += part["weight"]
        rows.append((index, part["loss_sum"], part["weight"], part["mean"]))
    mean = format_cell(loss["mean"])
    gives = (
        "gives one sum for all outputs of the step (whole_step), shown with the first micro-batch"
        if loss["whole_step"]
        else "gives a sum for each micro-batch"
    )
    return [
        f"{loss['name']} {gives}. The step divides once, by the weight of all its targets:",
        _table(
            ("micro-batch", "Σ loss", "÷ weight of its targets", "= mean"),
            rows,
            most_rows,
        ),
        Text.assemble(
            f"the step's loss is {total:.4g} ÷ {weight:.4g} = ", (mean, "bold"), "."
        ),
        _explain_epoch_loss(loss["epoch"]),
    ]


def _explain_epoch_loss(epoch: Report) -> str:
    """Why an epoch's loss is not the mean of its steps' losses."""
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


def _explain_graph(nodes: Sequence[Report], most_rows: int | None) -> list[Part]:
    rows = []
    for index, node in enumerate(nodes):
        name = node["name"].removeprefix("torch::autograd::")
        rows.append((index, name, ", ".join(node["parameters"])))
    if most_rows is not None:
        most_rows += FIRST_ROWS  # one layer takes several nodes
    return [
        f"backward() goes from the loss to the first layer, {len(rows)} nodes on the longest path:",
        _table(
            ("", "autograd node", "gives the gradient of"),
            rows,
            most_rows,
            text_columns=(0, 1, 2),
        ),
    ]


def _explain_gradients(report: Report, most_rows: int | None) -> list[Part]:
    rows = []
    for name, stages in report["gradients"].items():
        first, last = _norm(stages["after_first"]), _norm(stages["after_last"])
        rows.append(
            (name, _norm(stages["before"]), first, last, _norm(stages["reduced"]))
        )
    count = _count(len(report["batch"]["micro_batches"]), "micro-batch", "es")
    parts: list[Part] = [
        f"Norms before backward, after the first and the last of {count}, and as the optimizer receives them: "
        f"divided by the step's weight, summed over processes, clipped. None is no gradient yet; a backward adds to "
        f"what is there.",
        _table(
            ("parameter", "before", "after the first", "after the last", "reduced"),
            rows,
            most_rows,
        ),
    ]
    if report["reproducibility"] == "bitwise":
        parts.append(
            "bitwise: each micro-batch's gradient is taken away and added up in a fixed order, so here none adds up."
        )
    if report["gradient_scale"] != 1:
        parts.append(
            f"fp16: before the reduction, gradients are multiplied by {report['gradient_scale']:g}."
        )
    norm, limit = report["grad_norm"], report["max_grad_norm"]
    clipping = ""
    if limit is not None:
        clipping = f", clipped to {limit:g}" if norm > limit else f", under {limit:g}"
    parts.append(
        Text.assemble(
            "The whole gradient's norm is ", (f"{norm:.4g}", "bold"), f"{clipping}."
        )
    )
    return parts


def _explain_update(report: Report, most_rows: int | None) -> list[Part]:
    rows = []
    for name, update in report["updates"].items():
        gradient = _norm(report["gradients"][name]["reduced"])
        values = _first_values(update["first"][:3])
        rows.append((name, gradient, update["norm"], update["relative"], values))
    headings = (
        "parameter",
        "gradient",
        "change",
        "change ÷ weight",
        "first values of the change",
    )
    rate = f"{report['lr']:g}"
    return [
        f"{report['optimizer']} with learning rate {rate}; norms of the gradients and of what they changed:",
        _table(headings, rows, most_rows),
    ]


def _explain_batch_norm(section: Report, most_rows: int | None) -> list[Part]:
    layers = section["layers"]
    if not layers:
        return ["No layer keeps running statistics."]
    rows = []
    for name, stages in layers.items():
        before = stages["before"]
        # A layer that the first micro-batch did not reach has no values after it.
        states = (before, stages.get("after_first", before), stages["after"])
        rows.append((name, "mean\nvar", *map(_first_channel, states)))
    last = next(iter(layers.values()))["after"]
    return [
        f"Each of the {section['micro_batches']} micro-batches is normalised by its own statistics s, and moves the "
        f"running ones: r ← (1 − m) r + m s, with m = {last['momentum']:.4g} "
        f"(batch_norm.momentum_per={section['momentum_per']}). After the step {last['batches']} are counted.",
        _table(
            ("layer, channel 0", "", "before", "after the first", "after the step"),
            rows,
            most_rows,
        ),
    ]


def _first_channel(statistics: Report) -> str:
    """Mean and variance of channel 0, one below the other."""
    mean, variance = statistics["mean"]["first"], statistics["var"]["first"]
    return f"{mean[0]:.4g}\n{variance[0]:.4g}"


def _explain_zero_grad(steps: Report | None, most_rows: int | None) -> list[Part]:
    if steps is None:
        return ["This run has one step, so nothing would be left over for a second."]
    rows = []
    for name, gradients in steps.items():
        rows.append(
            (
                name,
                _norm(gradients["first"]),
                _norm(gradients["second"]),
                _norm(gradients["both"]),
            )
        )
    return [
        "zero_grad sets each gradient to None after the update. Were it forgotten, the second step's backward would "
        "add to the first one's gradient, and the optimizer would take both for one:",
        _table(
            ("parameter", "step 1", "step 2", "step 2 without zero_grad"),
            rows,
            most_rows,
        ),
    ]


def _table(
    headings: Sequence[str],
    rows: Sequence[Row],
    most_rows: int | None,
    *,
    text_columns: Sequence[int] = (0,),
) -> Table:
    """A table; of more than `most_rows` rows the first and the last, and between them how many are left out."""
    table = make_table(headings, text_columns=text_columns)
    if most_rows is None or len(rows) <= most_rows:
        add_rows(table, rows)
        return table
    add_rows(table, rows[: most_rows - LAST_ROWS])
    table.add_row(Text(f"… {len(rows) - most_rows} more (--all)", "dim"))
    add_rows(table, rows[-LAST_ROWS:])
    return table


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{plural}"


def _norm(values: Report | None) -> float | str:
    """The norm in a gradient's values, or that the gradient is None."""
    return "None" if values is None else float(values["norm"])


def _first_values(value: Any) -> Any:
    """A number as it is; of a list, its first values."""
    if not isinstance(value, list):
        return value
    text = " ".join(f"{number:.2g}" for number in value[:MOST_VALUES])
    return f"{text} …" if len(value) > MOST_VALUES else text
