"""What the best model of a run says of image files."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path
from typing import Any

import rich.console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from trainer.commands.arguments import split, whole_number
from trainer.data.folder import image_files
from trainer.errors import ConfigError, DataError, nearest
from trainer.inspection.export import ENDINGS, export
from trainer.inspection.predictor import Predictor

BAR = 12  # columns


def main(arguments: list[str]) -> None:
    """Classify the files, export the model, or both."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `predict … | head` is no error
    given = split(arguments, options=("top", "export"), flags=("json",))
    kind = given.options.get("export")
    if kind is not None and kind not in ENDINGS:
        raise ConfigError("--export", f'"{kind}" is not one of {", ".join(ENDINGS)}{nearest(kind, ENDINGS)}')
    top = whole_number({"top": "3", **given.options}, "top")
    if top == 0:
        raise ConfigError("--top", "0 classes tell nothing; give 1 or more")
    run, *paths = given.paths or [""]
    if not run or not (paths or kind):
        raise ConfigError("PATH", "is missing: predict RUN PATH…, where a PATH is an image, a folder or a glob")
    files = list(dict.fromkeys(file for path in paths for file in _found(path)))
    predictor = Predictor(Path(run), given.overrides)
    if kind is not None:  # first: files that cannot be read are no reason to go without
        print(export(predictor, kind, Path(run) / f"best{ENDINGS[kind]}"), file=sys.stderr)
    if files:
        _classify(predictor, files, top, as_json="json" in given.options or not sys.stdout.isatty())


def _found(path: str) -> Iterator[Path]:
    """The image files that a PATH means: itself, those within it, or those that its pattern matches."""
    here = Path(path).expanduser()
    if here.is_file():
        yield here
        return
    names = [path] if here.is_dir() else sorted(glob(str(here), recursive=True))  # noqa: PTH207 - absolute ones too
    matched = [Path(name).expanduser() for name in names]
    if not matched:
        raise DataError(f"{path} does not exist, nor does it match anything")
    files = [file for match in matched for file in (image_files(match) if match.is_dir() else [match])]
    if not files:
        raise DataError(f"{path} holds no image files")
    yield from files


def _classify(predictor: Predictor, files: list[Path], top: int, *, as_json: bool) -> None:
    """Print each file's classes; name those that cannot be used at once, and fail because of them at the end."""
    errors = rich.console.Console(stderr=True)
    classified: Iterable[tuple[Path, Tensor | DataError]] = predictor.classify(files)
    if not as_json:
        classified = track(classified, "classifying", len(files), console=errors, transient=True)
    answers = _usable(classified, errors)
    told = 0
    if as_json:
        for file, shares in answers:
            print(json.dumps(_answer(predictor, file, shares, top), ensure_ascii=False), flush=True)
            told += 1
    else:
        table, told = _table(predictor, answers, top)
        if told:
            rich.console.Console().print(table)
    if told < len(files):
        raise DataError(f"{len(files) - told:,} of {len(files):,} files could not be classified")


def _usable(
    classified: Iterable[tuple[Path, Tensor | DataError]], errors: rich.console.Console
) -> Iterator[tuple[Path, Tensor]]:
    for file, answer in classified:
        if isinstance(answer, DataError):
            errors.print(f"error: {answer}", markup=False, highlight=False, soft_wrap=True)
        else:
            yield file, answer


def _likeliest(predictor: Predictor, shares: Tensor, top: int) -> list[tuple[str, int, float]]:
    """Name, id and probability of the `top` likeliest classes."""
    best = shares.topk(min(top, len(shares)))
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(predictor.signature.name(class_id), class_id, share) for class_id, share in ranked]


def _answer(predictor: Predictor, file: Path, shares: Tensor, top: int) -> dict[str, Any]:
    keys = ("class", "class_id", "probability")
    ranked = [dict(zip(keys, found, strict=True)) for found in _likeliest(predictor, shares, top)]
    return {"file": str(file), **ranked[0], "top": ranked}


def _table(predictor: Predictor, answers: Iterable[tuple[Path, Tensor]], top: int) -> tuple[Table, int]:
    """A line for each file, and how many there are."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", no_wrap=True)
    if top > 1:
        table.add_column("then", overflow="fold", style="dim")
    for file, shares in answers:
        (name, _, share), *others = _likeliest(predictor, shares, top)
        bar = Text("━" * round(BAR * share), "green").append("━" * (BAR - round(BAR * share)), "bright_black")
        runners_up = " · ".join(f"{other} {100 * less:.1f} %" for other, _, less in others)
        cells = [Text(str(file)), Text(name), bar.append(f" {100 * share:5.1f} %", "default"), Text(runners_up)]
        table.add_row(*cells[: len(table.columns)])
    return table, table.row_count
