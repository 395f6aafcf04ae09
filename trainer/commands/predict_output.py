"""Which files `predict` classifies, and what it prints: a table for people, JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from trainer.data.folder import image_files
from trainer.errors import DataError
from trainer.inspection.predictor import Predictor

BAR_WIDTH = 12  # columns

# Each file's probabilities, (C,), or why there are none.
Results = Iterable[tuple[Path, Tensor | DataError]]


@dataclass(frozen=True)
class Candidate:
    """One class that a file may show."""

    name: str
    class_id: int
    probability: float

    def to_dict(self) -> dict[str, str | int | float]:
        return {
            "class": self.name,
            "class_id": self.class_id,
            "probability": self.probability,
        }


# A file and its likeliest classes, the likeliest first.
Answer = tuple[Path, list[Candidate]]


def find_images(paths: Iterable[str]) -> list[Path]:
    """The image files meant by some paths, each once: files, those in directories, those that match patterns.

    Raises `DataError` for a path that means none.
    """
    # A dict, because it keeps the order and drops repetitions.
    files: dict[Path, None] = {}
    for path in paths:
        files.update(dict.fromkeys(_find_images_of(path)))
    return list(files)


def _find_images_of(path: str) -> list[Path]:
    expanded = Path(path).expanduser()
    if expanded.is_file():
        return [expanded]
    matches = [expanded]
    if not expanded.is_dir():
        # glob() and not Path.glob(), which refuses absolute patterns.
        matches = [Path(name) for name in sorted(glob(str(expanded), recursive=True))]  # noqa: PTH207
    if not matches:
        raise DataError(f"{path} does not exist, and as a pattern it matches nothing")
    files = []
    for match in matches:
        files += image_files(match) if match.is_dir() else [match]
    if not files:
        raise DataError(f"{path} holds no image files")
    return files


def print_predictions(
    predictor: Predictor, files: list[Path], *, top: int, as_json: bool
) -> None:
    """Print the `top` likeliest classes of each file.

    A file that cannot be classified is named on stderr at once. Raises `DataError` at the end if there was one.
    """
    errors = Console(stderr=True)
    results: Results = predictor.classify(files)
    if not as_json:
        results = track(
            results, "classifying", len(files), console=errors, transient=True
        )
    answers = _rank(predictor, _report_unusable(results, errors), top)
    count = _print_json(answers) if as_json else _print_table(answers, top)
    if count < len(files):
        raise DataError(
            f"{len(files) - count:,} of {len(files):,} files could not be classified"
        )


def _report_unusable(
    results: Results, errors: Console
) -> Iterator[tuple[Path, Tensor]]:
    """Pass on the probabilities; print each error instead."""
    for file, result in results:
        if isinstance(result, DataError):
            errors.print(
                f"error: {result}", markup=False, highlight=False, soft_wrap=True
            )
        else:
            yield file, result


def _rank(
    predictor: Predictor, results: Iterable[tuple[Path, Tensor]], top: int
) -> Iterator[Answer]:
    for file, probabilities in results:
        values, class_ids = probabilities.topk(min(top, len(probabilities)))
        candidates = []
        for class_id, value in zip(class_ids.tolist(), values.tolist(), strict=True):
            candidates.append(
                Candidate(predictor.signature.name(class_id), class_id, value)
            )
        yield file, candidates


def _print_json(answers: Iterable[Answer]) -> int:
    """Print one object a line, as soon as it is known; returns how many."""
    count = 0
    for file, candidates in answers:
        likeliest = candidates[0].to_dict()
        line = {
            "file": str(file),
            **likeliest,
            "top": [candidate.to_dict() for candidate in candidates],
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
        count += 1
    return count


def _print_table(answers: Iterable[Answer], top: int) -> int:
    """Print a table with a row for each file; returns how many."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", no_wrap=True)
    if top > 1:
        table.add_column("then", overflow="fold", style="dim")
    for file, (likeliest, *others) in answers:
        cells = [
            Text(str(file)),
            Text(likeliest.name),
            _draw_bar(likeliest.probability),
        ]
        if top > 1:
            cells.append(
                Text(
                    " · ".join(
                        f"{other.name} {100 * other.probability:.1f} %"
                        for other in others
                    )
                )
            )
        table.add_row(*cells)
    if table.row_count:
        Console().print(table)
    return table.row_count


def _draw_bar(probability: float) -> Text:
    width = round(BAR_WIDTH * probability)
    bar = Text("━" * width, "green")
    bar.append("━" * (BAR_WIDTH - width), "bright_black")
    bar.append(f" {100 * probability:5.1f} %", "default")
    return bar
