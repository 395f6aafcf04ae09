"""Which files `predict` answers for, and what it prints: a table for people, JSON lines for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from trainer.commands.answer_text import HEADINGS, ClassName, describe, row
from trainer.components.answers import Answer
from trainer.data.folder import image_files
from trainer.data.names import printable
from trainer.errors import ConfigError, DataError
from trainer.inspection.predictor import Predictor
from trainer.reporting.plain_text import plain_console

MOST_CLASSES_OF_A_MASK = 256  # of 8 bits

# Each file's answer, or why there is none.
Results = Iterable[tuple[Path, Answer | DataError]]


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
    predictor: Predictor,
    files: list[Path],
    *,
    top: int,
    as_json: bool,
    masks: Path | None,
) -> None:
    """Print the answer for each file: of a classifier the `top` likeliest classes. `masks` is a directory for masks.

    A file that has no answer is named on stderr at once. Raises `DataError` at the end if there was one.
    """
    errors = plain_console(stderr=True)
    results: Results = predictor.predict(files)
    if not as_json:
        results = track(
            results, "predicting", len(files), console=errors, transient=True
        )
    answers = _report_unusable(results, errors)
    if masks is not None:
        answers = _write_masks(answers, masks, files)
    name = predictor.signature.name
    print_answers = _print_json if as_json else _print_table
    count = print_answers(answers, name, top)
    if count < len(files):
        raise DataError(
            f"{len(files) - count:,} of {len(files):,} files have no answer"
        )


def _report_unusable(
    results: Results, errors: Console
) -> Iterator[tuple[Path, Answer]]:
    """Pass on the answers; print each error instead."""
    for file, result in results:
        if isinstance(result, DataError):
            errors.print(f"error: {result}", soft_wrap=True)
        else:
            yield file, result


def _write_masks(
    answers: Iterable[tuple[Path, Answer]], directory: Path, files: Sequence[Path]
) -> Iterator[tuple[Path, Answer]]:
    """Write the class of each pixel as a PNG, `<directory>/<name of the file>.png`, and pass the answers on.

    Raises `ConfigError` if the model answers with no class for each pixel or two files have one name.
    """
    names = Counter(file.stem for file in files)
    name, count = max(names.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise ConfigError(
            "--masks",
            f'{count} files are named "{name}"; predict one directory at a time',
        )
    for file, answer in answers:
        if answer.kind != "class_map":
            raise ConfigError(
                "--masks", "the run's model gives no class for each pixel"
            )
        classes = answer.values.argmax(0)
        if len(answer.values) > MOST_CLASSES_OF_A_MASK:
            raise ConfigError(
                "--masks",
                f"a PNG holds {MOST_CLASSES_OF_A_MASK} classes, and the model has {len(answer.values)}",
            )
        directory.mkdir(parents=True, exist_ok=True)
        pixels = classes.to(torch.uint8).numpy()
        Image.fromarray(pixels).save(directory / f"{file.stem}.png")
        yield file, answer


def _print_json(
    answers: Iterable[tuple[Path, Answer]], name: ClassName, top: int
) -> int:
    """Print one object a line, as soon as it is known; returns how many."""
    count = 0
    for file, answer in answers:
        line = {"file": str(file), **describe(answer, name, top)}
        print(json.dumps(line, ensure_ascii=False), flush=True)
        count += 1
    return count


def _print_table(
    answers: Iterable[tuple[Path, Answer]], name: ClassName, top: int
) -> int:
    """Print a table with a row for each file; returns how many."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for file, answer in answers:
        if not table.columns:
            table.add_column("file", overflow="fold")
            for heading in HEADINGS[answer.kind]:
                table.add_column(heading, overflow="fold")
        table.add_row(Text(printable(file)), *row(answer, name, top))
    if table.row_count:
        plain_console().print(table)
    return table.row_count
