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

MOST_PICTURES = 12  # whole rows, whether of three or of four
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
    pictures = [] if images is None else _pictures(run, images, targets, answers)
    if pictures:
        path = folder / "predictions.png"
        _draw(pictures, answers[0], len(run.data.val), path)
        paths["predictions"] = path
    if answers[0].kind == "values":
        paths |= _draw_regression(run, folder)
    return paths


def _pictures(
    run: Run, images: Sequence[Tensor], targets: Any, answers: Sequence[Answer]
) -> list[_Picture]:
    """A picture of each image whose answer can be shown."""
    pictures = []
    by_sample = targets_by_sample(targets, len(images))
    for image, answer, target in zip(images, answers, by_sample, strict=False):
        picture = _picture(image, answer, target, run)
        if picture is not None:
            pictures.append(picture)
    return pictures


def images_in(run: Run, inputs: Any) -> list[Tensor] | None:
    """The images of a batch as they were before normalisation; None if there are none."""
    normalize = run.train_loader.normalize
    if isinstance(inputs, Mapping):
        for batch in inputs.values():
            # Of up to four channels: others are no pictures, such as features.
            is_batch = isinstance(batch, Tensor) and batch.dim() == 4
            if is_batch and batch.shape[1] <= 4:
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
    if not isinstance(target, Mapping):
        return None
    boxes = target.get("boxes")
    if isinstance(boxes, Tensor) and boxes.dim() == 2:
        return boxes
    return None


def _spread(samples: int, most: int) -> list[int]:
    count = min(samples, most)
    positions = np.linspace(0, samples - 1, count)
    ids = positions.round().astype(int).tolist()
    return sorted(set(ids))


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
    title = f"{_list_text(predicted)}\ntrue: {_list_text(true)}"
    colour = BLUE if predicted == true else VERMILION
    return _Picture(as_colour(image), title, colour)


def _names_of(holds: Tensor, names: list[str] | None) -> list[str]:
    """The labels that hold, by name or, where there is none, by number."""
    labels = []
    for label_id in holds.nonzero().flatten().tolist():
        if names and label_id < len(names):
            labels.append(names[label_id])
        else:
            labels.append(str(label_id))
    return labels


def _list_text(labels: list[str]) -> str:
    return ", ".join(labels) or "none"


def _numbers(image: Tensor, values: Tensor, target: Any) -> _Picture | None:
    if values.numel() > MOST_NUMBERS or not isinstance(target, Tensor):
        return None
    title = f"{_format(values)}\ntrue: {_format(target)}"
    return _Picture(as_colour(image), title, INK)


def _format(values: Tensor) -> str:
    numbers = values.flatten().tolist()
    return ", ".join(f"{number:.3g}" for number in numbers)


def _class_map(image: Tensor, values: Tensor, target: Any, run: Run) -> _Picture | None:
    if not isinstance(target, Tensor) or target.dim() != 2:
        return None
    names = run.data.classes
    shows_first = not names or names[0] != "background"
    true = target.cpu()
    predicted = values.argmax(0)
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
        is_right = true == predicted
        share = is_right[is_counted].double().mean().item()
        title = f"{100 * share:.1f} % of the pixels"
    return _Picture(pixels, title, INK)


def _boxes(image: Tensor, values: Tensor, target: Any) -> _Picture:
    scores = values[:, 4]
    found = values[scores >= LEAST_SCORE, :4]
    true = true_boxes(target)
    if true is None:
        true = values.new_zeros(0, 4)
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
    true = targets.flatten().double().cpu()
    stacked = torch.stack([answer.values for answer in answers])
    predicted = stacked.flatten().double()
    if len(true) != len(predicted) or len(true) > MOST_POINTS * MOST_NUMBERS:
        return {}
    path = folder / "regression.png"
    draw_regression(true.numpy(), predicted.numpy(), path)
    return {"regression": path}


def draw_regression(true: Any, predicted: Any, path: Path) -> None:
    """Draw each predicted value over its true one, and the line on which both are equal."""
    figure = new_figure(5.0, 5.0)
    axes = figure.subplots()
    is_finite = np.isfinite(true) & np.isfinite(predicted)
    true = true[is_finite]
    predicted = predicted[is_finite]
    both = np.concatenate([true, predicted])
    ends = (both.min(), both.max()) if len(both) else (0.0, 1.0)
    axes.plot(ends, ends, color=GREY, linewidth=1)
    axes.plot(true, predicted, "o", color=BLUE, markersize=3, alpha=0.5)
    axes.set_title(
        f"{len(true):,} values of validation samples",
        loc="left",
        fontsize=TITLE,
        color=INK,
    )
    axes.set_xlabel("true", fontsize=TEXT, color=INK)
    axes.set_ylabel("predicted", fontsize=TEXT, color=INK)
    style_axes(axes, grid="both")
    write(figure, path)
