"""Which figures a run gets: what is drawn, of which samples, by which model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.components.schedule import Schedule
from trainer.core.evaluation import Decision
from trainer.core.run import Run
from trainer.exact.plan import count_occurrences
from trainer.reporting.figures.answers import (
    draw_answers,
    images_in,
    targets_by_sample,
    true_boxes,
)
from trainer.reporting.figures.confusion import (
    Counts,
    class_table,
    count_decisions,
    draw_confusion_matrix,
    pixel_table,
)
from trainer.reporting.figures.curves import draw_curves
from trainer.reporting.figures.images import (
    MAX_IMAGES,
    PredictionGroup,
    draw_batch_grid,
    draw_predictions,
    draw_saliency,
)
from trainer.reporting.figures.overlays import (
    TRUE,
    as_colour,
    on_one_size,
    with_boxes,
)
from trainer.reporting.figures.saliency_maps import compute_saliency
from trainer.reporting.jsonl import read_rows
from trainer.storage import checkpoint
from trainer.storage.files import write_text
from trainer.storage.host_copies import host_copies

# Validation samples in the figures of predictions and of saliency maps.
MAX_WRONG = 8
MAX_RIGHT = 4
MAX_MAPS = 6
MAX_RATES = 2000  # points of the learning rate's curve


def draw(
    run: Run, directory: Path, *, has_best: bool, schedule: Schedule | None = None
) -> dict[str, Path]:
    """Draw the figures of a finished run, with its best model. A collective.

    `schedule` is the run's, whose learning rates are drawn step by step.
    Returns the paths by the figures' names on the main process; empty on the others. The run's model stays as it is.
    """
    # Drawing is slow. The others wait for it here, on the host.
    folder = directory / "figures"
    sets = list(run.data.named)
    paths: dict[str, Path] = run.ranks.on_main(
        lambda: _draw_metrics(directory, folder, sets, schedule)
    )
    if run.evaluator is not None and has_best:
        # The best model is loaded into the run's own module, so the last state must come back afterwards.
        last = _copies(run)
        run.load_best()
        is_segmentation = run.metrics.count_pixels
        decisions = [] if is_segmentation else run.evaluator.decisions()
        if is_segmentation:
            counts = run.evaluator.pixel_counts().numpy()
            paths |= run.ranks.on_main(lambda: _draw_pixels(counts, run, folder))
        if decisions:
            paths |= run.ranks.on_main(lambda: _draw_decisions(run, decisions, folder))
        elif not run.is_sharded:  # the main process runs the model by itself
            paths |= run.ranks.on_main(lambda: draw_answers(run, folder))
        run.module.load_state_dict(last)
    return paths if run.ranks.is_main else {}


def _copies(run: Run) -> dict[str, Tensor]:
    """Copies of the model's tensors; of what is shared out, of this rank's parts."""
    tensors = checkpoint.model_tensors(run.module)
    if not run.is_sharded:
        return host_copies(tensors)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _draw_metrics(
    directory: Path, folder: Path, sets: list[str], schedule: Schedule | None
) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    path = folder / "curves.png"
    rows = read_rows(directory / "metrics.jsonl")
    rates = None if schedule is None else rates_by_step(rows, schedule)
    draw_curves(rows, path, sets, rates)
    return {"curves": path}


def rates_by_step(
    rows: Sequence[Mapping[str, float]], schedule: Schedule
) -> list[tuple[float, float]] | None:
    """The learning rate of every step, or of enough of them; None where the rows are not those of the schedule.

    They are not where a resume has changed the rate or the schedule.
    """
    base = None  # the rate where the schedule's factor is 1
    last = 0
    logged = []
    for row in rows:
        if "lr" not in row:
            continue
        step, rate = int(row["step"]), row["lr"]
        factor = schedule.factor(step - 1)
        logged.append((rate, factor))
        last = max(last, step)
        # A factor of 0, as at the start of a warmup, says nothing of the base.
        if base is None and factor:
            base = rate / factor
    if base is None:
        return None
    for rate, factor in logged:
        if not math.isclose(rate, base * factor, rel_tol=1e-6, abs_tol=1e-12):
            return None
    every = max(1, last // MAX_RATES)
    rates: list[tuple[float, float]] = []
    for step in range(1, last + 1, every):
        rate = base * schedule.factor(step - 1)
        rates.append((step, rate))
    return rates


def _draw_decisions(
    run: Run, decisions: list[Decision], folder: Path
) -> dict[str, Path]:
    paths = _draw_confusion(decisions, run.data.classes, folder)
    return paths | _draw_samples(run, decisions, folder)


def draw_batch(run: Run, directory: Path) -> dict[str, Path]:
    """Draw the run's first samples as the model sees them, if they are images."""
    path = directory / "figures" / "batch.png"
    count = min(MAX_IMAGES, run.plan.batch_size)
    ids = run.plan.permutation(0)[:count]
    batch = run.train_loader.peek(ids, occurrences=count_occurrences(ids))
    images = images_in(run, batch.inputs)
    if images is None:
        return {}
    path.parent.mkdir(exist_ok=True)
    pictures = images
    targets = targets_by_sample(batch.targets, len(images))
    has_boxes = any(true_boxes(target) is not None for target in targets)
    if has_boxes:
        pictures = list(map(_with_true_boxes, images, targets))
    labels = [_label(target, run.data.classes) for target in targets]
    draw_batch_grid(_as_one(pictures), labels, path)
    return {"batch": path}


def _with_true_boxes(image: Tensor, target: Any) -> Tensor:
    boxes = true_boxes(target)
    return with_boxes(image, [] if boxes is None else [(boxes, TRUE)])


def _as_one(images: list[Tensor]) -> Tensor:
    """Images as one tensor; those of several sizes in colour, with white beside them."""
    if len({image.shape for image in images}) == 1:
        return torch.stack(images)
    return on_one_size([as_colour(image) for image in images])


def split_by_correctness(
    decisions: Sequence[Decision],
) -> tuple[list[Decision], list[Decision]]:
    """The wrong decisions, the most confident first, and the right ones, the least confident first."""
    # Ties are ordered by sample, so that any number of processes draws the same pictures.
    by_confidence = sorted(
        decisions, key=lambda decision: (decision.confidence, -decision.sample_id)
    )
    right, wrong = [], []
    for decision in by_confidence:
        if decision.predicted == decision.true:
            right.append(decision)
        else:
            wrong.append(decision)
    wrong.reverse()
    return wrong, right


def _draw_confusion(
    decisions: list[Decision], names: list[str] | None, folder: Path
) -> dict[str, Path]:
    counts = count_decisions(decisions, len(names or []))
    labels = [_label(i, names) for i in range(len(counts))]
    table = class_table(decisions, counts, labels)
    return _write_confusion(counts, labels, table, folder, counted="samples")


def _draw_pixels(counts: Counts, run: Run, folder: Path) -> dict[str, Path]:
    """The confusion matrix of a segmentation, and the table of its classes."""
    named = len(run.data.classes or [])
    missing = max(0, named - len(counts))
    counts = np.pad(counts, (0, missing))  # classes that are nowhere
    labels = [_label(i, run.data.classes) for i in range(len(counts))]
    table = pixel_table(counts, labels)
    return _write_confusion(counts, labels, table, folder, counted="pixels")


def _write_confusion(
    counts: Counts, labels: list[str], table: str, folder: Path, *, counted: str
) -> dict[str, Path]:
    matrix_path = folder / "confusion_matrix.png"
    table_path = folder / "per_class.csv"
    draw_confusion_matrix(counts, labels, matrix_path, counted)
    write_text(table_path, table)
    return {"confusion_matrix": matrix_path, "per_class": table_path}


def _draw_samples(run: Run, decisions: list[Decision], folder: Path) -> dict[str, Path]:
    """Validation samples with their predictions, and with their saliency maps; nothing if they are no images."""
    wrong, right = split_by_correctness(decisions)
    of_all = f"of {len(decisions):,} validation samples"
    of_wrong = f"Wrong: {len(wrong):,} {of_all}, the most confident first"
    of_right = f"Right: {len(right):,} {of_all}, the least confident first"
    wrong, right = wrong[:MAX_WRONG], right[:MAX_RIGHT]
    sections = [(of_wrong, wrong), (of_right, right)]
    with_maps = [*wrong, *right][:MAX_MAPS]
    inputs = _validation_inputs(run, with_maps)
    if not _are_images(inputs):
        return {}
    paths = {"predictions": folder / "predictions.png"}
    groups = []
    for heading, samples in sections:
        if samples:
            groups.append(_prediction_group(run, heading, samples))
    draw_predictions(groups, paths["predictions"])
    if run.is_sharded:  # maps run the model on the main process alone
        return paths
    # On the inputs as the model sees them; the pictures show them before normalisation.
    maps = compute_saliency(run.task, run.module, inputs)
    if maps is not None:
        heading = "What the predicted class rests on: bright regions count most"
        group = _prediction_group(run, heading, with_maps)
        paths["saliency"] = folder / "saliency.png"
        draw_saliency(group, maps, paths["saliency"])
    return paths


def _prediction_group(
    run: Run, heading: str, decisions: Sequence[Decision]
) -> PredictionGroup:
    assert run.val_loader is not None
    names = run.data.classes
    inputs = _validation_inputs(run, decisions)
    return PredictionGroup(
        heading,
        images=run.val_loader.normalize.undo(inputs),
        predicted=[_label(decision.predicted, names) for decision in decisions],
        confidence=[decision.confidence for decision in decisions],
        true=[_label(decision.true, names) for decision in decisions],
    )


def _validation_inputs(run: Run, decisions: Sequence[Decision]) -> Any:
    assert run.val_loader is not None
    ids = [decision.sample_id for decision in decisions]
    return run.val_loader.peek(ids).inputs


def _are_images(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) and inputs.dim() == 4


def _label(target: Any, names: list[str] | None) -> str:
    """A target in words: a class's name, else a number; nothing for what is neither."""
    if isinstance(target, Tensor):
        target = target.item() if target.numel() == 1 else target.tolist()
    if isinstance(target, float):
        return f"{target:.3g}"
    if not isinstance(target, int):
        return ""
    if names and 0 <= target < len(names):
        return names[target]
    return str(target)
