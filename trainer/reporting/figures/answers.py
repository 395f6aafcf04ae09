"""What a model answers for some validation samples beside what is true: labels, numbers, classes of pixels, boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.components.answers import Answer
from trainer.core.run import Run
from trainer.data.normalize import are_images
from trainer.reporting.figures.images import draw_pictures
from trainer.reporting.figures.overlays import (
    PREDICTED,
    TRUE,
    as_colour,
    on_one_size,
    side_by_side,
    with_boxes,
    with_classes,
)
from trainer.reporting.figures.style import (
    BLUE,
    GREY,
    INK,
    TEXT,
    TITLE,
    VERMILION,
    new_figure,
    style_axes,
    write,
)

MOST_PICTURES = 12
MOST_POINTS = 500  # samples of a regression
MOST_NUMBERS = 8  # of a sample, in a picture's title
LEAST_SCORE = 0.5  # of a box, and of a label that holds


class _Picture(NamedTuple):
    pixels: Tensor  # (3, H, W) in [0, 1]
    title: str
    colour: str


def draw_answers(run: Run, folder: Path) -> dict[str, Path]:
    """Draw a task's answers, unless they are classes of whole samples; {} where it has none. Not a collective."""
    assert run.evaluator is not None and run.data.val is not None
    ids = _spread(len(run.data.val), MOST_PICTURES)
    inputs, targets, answers = run.evaluator.answers(ids)
    if not answers or answers[0].kind == "class":
        return {}
    paths: dict[str, Path] = {}
    images = images_in(run, inputs)
    if images is not None:
        pictures = []
        by_sample = targets_by_sample(targets, len(images))
        for image, answer, target in zip(images, answers, by_sample, strict=False):
            picture = _picture(image, answer, target, run)
            if picture is not None:
                pictures.append(picture)
        if pictures:
            paths["predictions"] = folder / "predictions.png"
            _draw(pictures, answers[0], len(run.data.val), paths["predictions"])
    if answers[0].kind == "values":
        paths |= _draw_regression(run, folder)
    return paths


def images_in(run: Run, inputs: Any) -> list[Tensor] | None:
    """The images of a batch as they were before normalisation; None if there are none."""
    normalize = run.train_loader.normalize
    if isinstance(inputs, Mapping):
        for batch in inputs.values():
            # Of up to four channels: others are no pictures, such as features.
            if isinstance(batch, Tensor) and batch.dim() == 4 and batch.shape[1] <= 4:
                return [image.float().cpu() for image in batch]
        return None
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        return list(normalize.undo(inputs))
    if are_images(inputs):
        return [normalize.undo(image) for image in inputs]
    return None


def targets_by_sample(targets: Any, samples: int) -> Sequence[Any]:
    """A batch's targets, one for each of its `samples`; each is None where they are not that."""
    if isinstance(targets, Tensor | list | tuple) and len(targets) == samples:
        return list(targets)
    return [None] * samples


def true_boxes(target: Any) -> Tensor | None:
    """The boxes `(K, 4)` of a detector's target."""
    boxes = target.get("boxes") if isinstance(target, Mapping) else None
    return boxes if isinstance(boxes, Tensor) and boxes.dim() == 2 else None


def _spread(samples: int, most: int) -> list[int]:
    ids = np.linspace(0, samples - 1, min(samples, most)).round().astype(int)
    return sorted(set(ids.tolist()))


def _picture(image: Tensor, answer: Answer, target: Any, run: Run) -> _Picture | None:
    names = run.data.classes
    match answer.kind:
        case "labels":
            return _labels(image, answer.values.flatten(), target, names)
        case "values":
            return _numbers(image, answer.values, target)
        case "class_map":
            return _class_map(image, answer.values, target, run)
        case "boxes":
            return _boxes(image, answer.values, target)
    return None


def _labels(
    image: Tensor, probabilities: Tensor, target: Any, names: list[str] | None
) -> _Picture:
    predicted = _names_of(probabilities >= LEAST_SCORE, names)
    true = _names_of(target.flatten().cpu() >= LEAST_SCORE, names)
    title = f"{', '.join(predicted) or 'none'}\ntrue: {', '.join(true) or 'none'}"
    return _Picture(as_colour(image), title, BLUE if predicted == true else VERMILION)


def _names_of(holds: Tensor, names: list[str] | None) -> list[str]:
    ids = holds.nonzero().flatten().tolist()
    return [names[i] if names and i < len(names) else str(i) for i in ids]


def _numbers(image: Tensor, values: Tensor, target: Any) -> _Picture | None:
    if values.numel() > MOST_NUMBERS or not isinstance(target, Tensor):
        return None
    title = f"{_format(values)}\ntrue: {_format(target)}"
    return _Picture(as_colour(image), title, INK)


def _format(values: Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in values.flatten().tolist())


def _class_map(image: Tensor, values: Tensor, target: Any, run: Run) -> _Picture | None:
    if not isinstance(target, Tensor) or target.dim() != 2:
        return None
    names = run.data.classes
    shows_first = not names or names[0] != "background"
    true, predicted = target.cpu(), values.argmax(0)
    is_counted = torch.ones_like(true, dtype=torch.bool)
    if run.task.ignore_index is not None:
        is_counted = true != run.task.ignore_index
        true = true.where(is_counted, 0)
    pixels = side_by_side(
        with_classes(image, true, shows_first),
        with_classes(image, predicted, shows_first),
    )
    title = "true and predicted"
    if true.shape == predicted.shape and is_counted.any():
        share = (true == predicted)[is_counted].double().mean().item()
        title = f"{100 * share:.1f} % of the pixels"
    return _Picture(pixels, title, INK)


def _boxes(image: Tensor, values: Tensor, target: Any) -> _Picture:
    found = values[values[:, 4] >= LEAST_SCORE, :4]
    true = true_boxes(target)
    true = values.new_zeros(0, 4) if true is None else true
    pixels = with_boxes(image, [(true, TRUE), (found, PREDICTED)])
    return _Picture(pixels, f"{len(found)} found, {len(true)} true", INK)


HEADINGS = {
    "labels": "labels, and the true ones below",
    "values": "numbers, and the true ones below",
    "class_map": "the true class of each pixel, and beside it the predicted one",
    "boxes": "true boxes in blue, and those found in vermilion",
}


def _draw(
    pictures: Sequence[_Picture], answer: Answer, samples: int, path: Path
) -> None:
    heading = (
        f"{len(pictures)} of {samples:,} validation samples: {HEADINGS[answer.kind]}"
    )
    draw_pictures(
        heading,
        on_one_size([picture.pixels for picture in pictures]),
        [picture.title for picture in pictures],
        [picture.colour for picture in pictures],
        path,
    )


def _draw_regression(run: Run, folder: Path) -> dict[str, Path]:
    """The predicted values over the true ones, of up to 500 samples."""
    assert run.evaluator is not None and run.data.val is not None
    ids = _spread(len(run.data.val), MOST_POINTS)
    _, targets, answers = run.evaluator.answers(ids)
    if not isinstance(targets, Tensor) or len(targets) != len(answers):
        return {}
    true = targets.flatten().double().cpu().numpy()
    predicted = torch.stack([answer.values for answer in answers]).flatten().double()
    if len(true) != len(predicted) or len(true) > MOST_POINTS * MOST_NUMBERS:
        return {}
    path = folder / "regression.png"
    draw_regression(true, predicted.numpy(), path)
    return {"regression": path}


def draw_regression(true: Any, predicted: Any, path: Path) -> None:
    """Draw each predicted value over its true one, and the line on which both are equal."""
    figure = new_figure(5.0, 5.0)
    axes = figure.subplots()
    finite = np.isfinite(true) & np.isfinite(predicted)
    both = np.concatenate([true[finite], predicted[finite]])
    ends = (both.min(), both.max()) if len(both) else (0.0, 1.0)
    axes.plot(ends, ends, color=GREY, linewidth=1)
    axes.plot(true[finite], predicted[finite], "o", color=BLUE, markersize=3, alpha=0.5)
    axes.set_title(
        f"{finite.sum():,} values of validation samples",
        loc="left",
        fontsize=TITLE,
        color=INK,
    )
    axes.set_xlabel("true", fontsize=TEXT, color=INK)
    axes.set_ylabel("predicted", fontsize=TEXT, color=INK)
    style_axes(axes, grid="both")
    write(figure, path)
