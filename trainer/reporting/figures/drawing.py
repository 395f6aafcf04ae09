"""A run's figures: what is drawn, of which samples, by which model."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.core.build import Run
from trainer.core.evaluation import Decision
from trainer.data.loading import Loader
from trainer.reporting import figures
from trainer.reporting.figures import Predicted
from trainer.reporting.figures.saliency_maps import saliency
from trainer.reporting.jsonl import read_rows
from trainer.storage import checkpoint
from trainer.storage.files import write_text

WRONG, RIGHT, MAPPED = 8, 4, 6  # validation samples whose predictions are drawn, and those with a map


def draw(run: Run, directory: Path, *, has_best: bool) -> dict[str, Path]:
    """Draw the run's figures by its best model. A collective; the main process gets their paths."""
    folder = directory / "figures"
    drawn: dict[str, Path] = {}
    if run.ranks.is_main:
        folder.mkdir(exist_ok=True)
        drawn["curves"] = folder / "curves.png"
        figures.curves(read_rows(directory / "metrics.jsonl"), drawn["curves"])
    if run.evaluator is None or not has_best:
        return drawn
    last = checkpoint.snapshot(run.module)
    run.load_best()
    decisions = run.evaluator.decisions()
    if run.ranks.is_main and decisions:
        drawn |= _draw_decisions(run, decisions, folder)
    run.module.load_state_dict(last)
    return drawn


def draw_batch(run: Run, directory: Path) -> dict[str, Path]:
    """Draw the run's first samples, as the model sees them, where they are images."""
    path = directory / "figures" / "batch.png"
    batch = run.train_loader.peek(run.plan.permutation(0)[: min(64, run.plan.batch_size)])
    if not _are_images(batch.inputs):
        return {}
    path.parent.mkdir(exist_ok=True)
    labels = [_label(target, run.data.classes) for target in batch.targets]
    figures.batch_grid(run.train_loader.normalize.undo(batch.inputs), labels, path)
    return {"batch": path}


def _draw_decisions(run: Run, decisions: list[Decision], folder: Path) -> dict[str, Path]:
    """The confusion matrix of the validation data; where they are images, some of them and what the model saw there."""
    assert run.val_loader is not None
    paths = {name: folder / f"{name}.png" for name in ("predictions", "saliency", "confusion_matrix")}
    paths["per_class"] = folder / "per_class.csv"
    names, loader = run.data.classes, run.val_loader
    matrix = confusion(decisions, len(names) if names else None)
    classes = [_label(i, names) for i in range(len(matrix))]
    figures.confusion_matrix(matrix, classes, paths["confusion_matrix"])
    write_text(paths["per_class"], per_class(matrix, classes))
    wrong, right = split_by_correctness(decisions)
    shown = [*wrong[:WRONG], *right[:RIGHT]][:MAPPED]
    inputs = loader.peek([decision.sample_id for decision in shown]).inputs
    if not _are_images(inputs):
        return {name: paths[name] for name in ("confusion_matrix", "per_class")}
    of = f"of {len(decisions):,} validation samples"
    groups = [
        _predicted(f"Wrong: {len(wrong):,} {of}, the surest first", wrong[:WRONG], loader, names),
        _predicted(f"Right: {len(right):,} {of}, the least sure first", right[:RIGHT], loader, names),
    ]
    figures.predictions([group for group in groups if group.true], paths["predictions"])
    maps = saliency(run.task, run.module, inputs)
    if maps is None:
        del paths["saliency"]
    else:
        heading = "What the predicted class rests on: bright places count most"
        figures.saliency(_predicted(heading, shown, loader, names), maps, paths["saliency"])
    return paths


def split_by_correctness(decisions: Sequence[Decision]) -> tuple[list[Decision], list[Decision]]:
    """The wrong ones, the surest first, and the right ones, the least sure first."""
    by_confidence = sorted(decisions, key=lambda decision: (decision.confidence, -decision.sample_id))
    wrong = [decision for decision in reversed(by_confidence) if decision.predicted != decision.true]
    return wrong, [decision for decision in by_confidence if decision.predicted == decision.true]


def _predicted(heading: str, shown: Sequence[Decision], loader: Loader, names: list[str] | None) -> Predicted:
    return Predicted(
        heading,
        loader.normalize.undo(loader.peek([d.sample_id for d in shown]).inputs) if shown else torch.empty(0),
        [_label(d.predicted, names) for d in shown],
        [d.confidence for d in shown],
        [_label(d.true, names) for d in shown],
    )


def confusion(decisions: Sequence[Decision], classes: int | None) -> Tensor:
    """How often each class (row) was taken for each (column), integers `(C, C)`."""
    true, predicted = (torch.tensor([getattr(d, name) for d in decisions]) for name in ("true", "predicted"))
    size = max(classes or 0, int(max(true.max(), predicted.max())) + 1)
    return torch.bincount(true * size + predicted, minlength=size * size).view(size, size)


def per_class(matrix: Tensor, classes: Sequence[str]) -> str:
    """A confusion matrix as CSV: each class that has samples, how many, its accuracy, what it is most taken for."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class", "samples", "accuracy", "most taken for", "times"])
    for number, (name, counts) in enumerate(zip(classes, matrix.tolist(), strict=True)):
        right, samples = counts[number], sum(counts)
        counts[number] = 0
        worst = max(range(len(counts)), key=counts.__getitem__)
        if samples:
            taken_for = classes[worst] if counts[worst] else ""
            table.writerow([name, samples, round(right / samples, 6), taken_for, counts[worst]])
    return text.getvalue()


def _are_images(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) and inputs.dim() == 4


def _label(target: Any, names: list[str] | None) -> str:
    if isinstance(target, Tensor):
        target = target.item() if target.numel() == 1 else target.tolist()
    if isinstance(target, int):
        return names[target] if names and 0 <= target < len(names) else str(target)
    return f"{target:.3g}" if isinstance(target, float) else ""
