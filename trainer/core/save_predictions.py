"""The observer `save_predictions`: what the model answers for every validation sample, in a file for each evaluation.

<run>/predictions/val/step_00000023.csv
id,target,predicted,probability
0,6,6,0.9981734
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.components.answers import Answer
from trainer.components.targets import largest_class
from trainer.core.metrics import Row
from trainer.core.observers import Observer
from trainer.core.run import Run
from trainer.errors import ConfigError
from trainer.exact.plan import Ids, Step
from trainer.storage.files import make_folder, new_file, write_text
from trainer.storage.run_directory import run_path
from trainer.storage.stateful import write_tensors

FORMATS = ("csv", "safetensors")
MOST_COLUMNS = 1000  # of what a CSV file has of one kind
# What a CSV file has of the arrays, in this order, and what it calls a column.
COLUMNS = {
    "ids": "id",
    "targets": "target",
    "predicted": "predicted",
    "probability": "probability",
    "probabilities": "probability",
    "values": "value",
    "output": "output",
    "boxes": "box",
}
BOX = ["x1", "y1", "x2", "y2", "score", "class"]

Arrays = dict[str, npt.NDArray[Any]]


class SavePredictions(Observer):
    """Writes the answers of every `every`-th evaluation, by sample id, each once: the same on any number of ranks.

    `format` is `csv`, a line for each sample (of a classifier the class and its probability), or `safetensors`, with
    `ids`, `targets` and all probabilities or values. The classes of pixels need the latter. Of a detector, a line is an
    object: a sample has as many as were found.
    """

    may_stop = False

    def __init__(self, every: int = 1, format: str = "csv") -> None:
        is_whole = isinstance(every, int) and not isinstance(every, bool)
        if not is_whole or every < 1:
            raise ConfigError(
                "observers",
                f"save_predictions: every={every} is not a whole number of at least 1",
            )
        if format not in FORMATS:
            raise ConfigError(
                "observers",
                f'save_predictions: format="{format}" is not one of {", ".join(FORMATS)}',
            )
        self.every = every
        self.format = format
        self._evaluations: dict[str, int] = {}  # so far, of each name
        # Of this rank's batches, by the evaluation's name.
        self._parts: dict[str, list[Arrays]] = {}
        self._problem: ConfigError | None = None

    def begin(self, run: Run) -> None:
        self._run = run
        self._parts = {}

    def evaluation_batch(
        self, evaluation: str, ids: Ids, output: Any, targets: Any
    ) -> None:
        if not self._is_due(evaluation) or self._problem is not None:
            return
        try:
            part = self._part(ids, output, targets)
            self._parts.setdefault(evaluation, []).append(part)
        except ConfigError as error:
            self._problem = (
                error  # other ranks may have no batch, and wait in `evaluation`
            )

    def _part(self, ids: Ids, output: Any, targets: Any) -> Arrays:
        """What is kept of a batch."""
        task = self._run.task
        answer = task.answer(output)
        if answer is not None and answer.kind == "boxes":
            return _boxes(ids, answer.values)
        part: Arrays = {"ids": ids}
        converted = task.convert_targets(output, targets)
        if _is_by_sample(converted, len(ids)):
            part["targets"] = _to_numpy(converted)
        return part | _answers(answer, output, len(ids))

    def evaluation(self, evaluation: str, step: Step, metrics: Row) -> None:
        if self._is_due(evaluation):
            self._run.ranks.on_each(self._raise_problem)
            own_parts = self._parts.pop(evaluation, [])
            of_ranks = self._run.ranks.gather_on_main(own_parts)
            parts = list(chain.from_iterable(of_ranks))
            self._run.ranks.on_main(lambda: self._write(evaluation, step, parts))
        self._evaluations[evaluation] = self._evaluations.get(evaluation, 0) + 1

    def _raise_problem(self) -> None:
        if self._problem is not None:
            raise self._problem

    def _is_due(self, evaluation: str) -> bool:
        number = self._evaluations.get(evaluation, 0) + 1
        return number % self.every == 0

    def _write(self, evaluation: str, step: Step, parts: list[Arrays]) -> None:
        columns = _join(parts)
        folder = make_folder(
            run_path(self._run.config.run), f"predictions/{evaluation}"
        )
        path = folder / f"step_{step.number:08d}.{self.format}"
        if self.format == "csv":
            write_text(path, _as_csv(columns))
        else:
            with new_file(path) as partial:
                write_tensors(partial, _as_tensors(columns))

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": dict(self._evaluations)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._evaluations = dict(state["evaluations"])


# The names under which a config may have them.
SHORT_NAMES = {"save_predictions": SavePredictions}


def _answers(answer: Answer | None, output: Any, samples: int) -> Arrays:
    """What is kept of a batch's output."""
    if answer is None:
        if _is_by_sample(output, samples):
            return {"output": _to_numpy(output)}
        raise ConfigError(
            "observers",
            "save_predictions: what this task answers for a sample is not known; give the task an `answer` method "
            "(docs/bring-your-own.md)",
        )
    if answer.kind == "class_map":
        return {"classes": _to_numpy(largest_class(answer.values))}
    name = "values" if answer.kind == "values" else "probabilities"
    kept = {name: _to_numpy(answer.values)}
    if answer.kind == "class":
        probability, predicted = answer.values.max(1)
        kept["predicted"] = _to_numpy(predicted)
        kept["probability"] = _to_numpy(probability)
    return kept


def _is_by_sample(value: Any, samples: int) -> bool:
    """True for a tensor with a row for each sample."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == samples


def _boxes(ids: Ids, tables: list[Tensor]) -> Arrays:
    """A row for each object, `(K, 6)` of each sample, with the sample's id."""
    counts = [len(table) for table in tables]
    return {"ids": np.repeat(ids, counts), "boxes": _to_numpy(torch.cat(tables))}


def _to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
        tensor = tensor.float()
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def _join(parts: list[Arrays]) -> Arrays:
    """The arrays of all batches, in the order of the sample ids."""
    columns: Arrays = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        shapes = {array.shape[1:] for array in arrays}
        if len(shapes) > 1:
            raise ConfigError(
                "observers",
                f"save_predictions: the {name} of samples have different shapes, such as "
                f"{' and '.join(map(str, sorted(shapes)[:2]))}, and one file holds one shape",
            )
        columns[name] = np.concatenate(arrays)
    ids = columns["ids"]
    order = np.argsort(ids, kind="stable")
    columns = {name: array[order] for name, array in columns.items()}
    # One that `data.bad_samples=quarantine` leaves out is missing.
    is_unique = len(np.unique(ids)) == len(ids)
    assert is_unique or "boxes" in columns, "a sample is there twice"
    return columns


def _as_csv(arrays: Arrays) -> str:
    """A line for each sample. A float has as many digits as tell it from its neighbours."""
    if "classes" in arrays:
        raise _too_wide("the classes of its pixels")
    names = [name for name in COLUMNS if name in arrays]
    if "predicted" in names and "probabilities" in names:
        names.remove("probabilities")
    headings: list[str] = []
    tables = []
    for name in names:
        table = arrays[name].reshape(len(arrays["ids"]), -1)
        if table.shape[1] > MOST_COLUMNS:
            raise _too_wide(f"its {table.shape[1]:,} {name}")
        tables.append(table)
        headings += _headings(name, arrays[name].ndim > 1, table.shape[1])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    for rows in zip(*tables, strict=True):
        # NumPy's own text of a number is the shortest that reads back as the same.
        writer.writerow(map(str, chain.from_iterable(rows)))
    return text.getvalue()


def _headings(name: str, has_several: bool, count: int) -> list[str]:
    if name == "boxes":
        return BOX
    heading = COLUMNS[name]
    if not has_several:
        return [heading]
    return [f"{heading}_{index}" for index in range(count)]


def _too_wide(what: str) -> ConfigError:
    return ConfigError(
        "observers",
        f"save_predictions: a line of CSV for a sample has no room for {what}; set format: safetensors",
    )


def _as_tensors(columns: Arrays) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(np.ascontiguousarray(array))
        for name, array in columns.items()
    }
