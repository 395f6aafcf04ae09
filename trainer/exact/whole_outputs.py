"""What the micro-batches of a step have given, joined in the order of its samples, on every rank.

Ranks send bytes and nothing is added up, so the result has the same bits on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trainer.errors import ConfigError
from trainer.exact.plan import IndexRange, Step
from trainer.exact.structures import describe_tensors, map_tensors, tensors_in
from trainer.process.ranks import Ranks

KEY = "loss.name"
PLAIN = (int, float, str, bool)


class Part(NamedTuple):
    """What a forward of the micro-batches `indices` has given: any structure of tensors with a row for each sample."""

    indices: IndexRange
    value: Any


class _Report(NamedTuple):
    """What a rank says of its parts before any tensor is sent: all ranks must agree, also one that has none."""

    # The structure, its tensors without rows and on the CPU; None of a rank without parts.
    template: Any = None
    problem: str = ""


def join_step(ranks: Ranks, step: Step, parts: Sequence[Part]) -> Any:
    """One structure with the rows of all samples of `step`, in order, from each rank's `parts`. A collective.

    The tensors are contiguous. Waits for the other hosts. Raises `ConfigError` on every rank where parts do not fit
    together: a tensor without a row for each sample, or other shapes, dtypes or plain values in another part.
    """
    reports: list[_Report] = ranks.gather([_report(step, parts)])
    template = _agreed_template(reports)
    own = _joined(parts)
    if ranks.count == 1:
        return _filled(template, own)
    layout = [tensor.to(ranks.device) for tensor in tensors_in(template)]
    return _filled(template, _exchange(ranks, step, own, layout))


def rows_of(step: Step, indices: IndexRange) -> slice:
    """Where the samples of some micro-batches are among those of the step."""
    first, end = indices
    return slice(step.micro_batches[first][0], step.micro_batches[end - 1][1])


# ---------------------------------------------------------------- do they fit together?


def _report(step: Step, parts: Sequence[Part]) -> _Report:
    templates = []
    for indices, value in parts:
        rows = rows_of(step, indices)
        problem = _problem_of(value, rows.stop - rows.start)
        if problem:
            return _Report(problem=problem)
        templates.append(map_tensors(_without_rows, value))
    if not templates:
        return _Report()
    return _Report(templates[0], _first_difference(templates))


def _agreed_template(reports: Sequence[_Report]) -> Any:
    templates = []
    for template, problem in reports:
        if problem:
            raise ConfigError(KEY, problem)
        if template is not None:
            templates.append(template)
    difference = _first_difference(templates)
    if difference:
        raise ConfigError(KEY, difference)
    return templates[0]


def _problem_of(value: Any, samples: int) -> str:
    """Why this part cannot be joined with others; "" if it can."""
    for tensor in tensors_in(value):
        if not tensor.dim() or len(tensor) != samples:
            return (
                f"whole_step joins outputs and targets by sample, and a micro-batch of {samples} samples has a tensor "
                f"{describe_tensors(tensor)}; give each tensor a row for each sample (two views of each: (N, 2, …)) "
                f"and keep what belongs to no sample, such as a temperature, as a parameter of the task"
            )
    if next(tensors_in(value), None) is None:
        return f"whole_step joins tensors, and a micro-batch gave {describe_tensors(value)}"
    return ""


def _first_difference(templates: Sequence[Any]) -> str:
    for template in templates[1:]:
        if _facts(template) != _facts(templates[0]):
            return (
                f"whole_step joins outputs and targets by sample, and one micro-batch gave "
                f"{describe_tensors(templates[0])} (without its rows), another {describe_tensors(template)}; give the "
                f"same structure, shapes and plain values for every micro-batch"
            )
    return ""


def _facts(template: Any) -> tuple[Any, ...]:
    tensors = [(tuple(t.shape), t.dtype) for t in tensors_in(template)]
    plain = [leaf for leaf in tree_leaves(template) if isinstance(leaf, PLAIN)]
    return type(template), tensors, plain


def _without_rows(tensor: Tensor) -> Tensor:
    return torch.empty((0, *tensor.shape[1:]), dtype=tensor.dtype)


# ---------------------------------------------------------------- joining


def _joined(parts: Sequence[Part]) -> list[Tensor]:
    """This rank's rows of each tensor of the structure, copied into memory of their own; nothing without parts."""
    if not parts:
        return []
    joined = []
    for tensors in zip(*(tensors_in(part.value) for part in parts), strict=True):
        rows = [tensor.detach().contiguous() for tensor in tensors]
        joined.append(torch.cat(rows))
    return joined


def _exchange(
    ranks: Ranks, step: Step, own: Sequence[Tensor], layout: Sequence[Tensor]
) -> list[Tensor]:
    """Every rank's rows, one rank after the other: of each tensor in `layout`, which has none."""
    rows_by_rank = []
    for first, end in step.ranks:
        rows = rows_of(step, (first, end)) if end > first else slice(0, 0)
        rows_by_rank.append(rows.stop - rows.start)
    most = max(rows_by_rank)
    # All ranks send as many bytes: those with fewer rows leave the end of each part empty.
    sizes = [_bytes_of_a_row(tensor) * most for tensor in layout]
    shard = torch.zeros(sum(sizes), dtype=torch.uint8, device=ranks.device)
    for part, tensor in zip(torch.split(shard, sizes), own, strict=False):
        flat = tensor.reshape(-1).view(torch.uint8)
        part[: flat.numel()] = flat
    received = shard.new_empty(ranks.count, sum(sizes))
    ranks.all_gather_by_sends(shard, received)

    whole = []
    columns = torch.split(received, sizes, dim=1)
    for column, tensor in zip(columns, layout, strict=True):
        row_size = _bytes_of_a_row(tensor)
        rows_of_ranks = []
        for of_rank, count in zip(column, rows_by_rank, strict=True):
            rows_of_ranks.append(of_rank[: count * row_size])
        # Joined bytes begin at an address that every dtype can have.
        flat = torch.cat(rows_of_ranks).view(tensor.dtype)
        whole.append(flat.view(step.size, *tensor.shape[1:]))
    return whole


def _bytes_of_a_row(tensor: Tensor) -> int:
    elements = 1
    for size in tensor.shape[1:]:
        elements *= size
    return elements * tensor.element_size()


def _filled(template: Any, tensors: Sequence[Tensor]) -> Any:
    """The structure `template` with `tensors` in the place of its own."""
    remaining = iter(tensors)

    def next_one(_: Tensor) -> Tensor:
        return next(remaining)

    return map_tensors(next_one, template)
