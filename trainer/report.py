"""What a run shows of itself: the header's facts, the summary, the figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint, figures
from trainer.determinism import SETTINGS
from trainer.evaluation import Decision
from trainer.files import tensors_sha256, write_text
from trainer.models import count_parameters
from trainer.optimizer import named_state
from trainer.parts import Parts
from trainer.plan import Plan
from trainer.schedule import Schedule
from trainer.tracking.jsonl import read_rows

SHOWN = 6  # validation samples whose predictions are drawn


def header(parts: Parts, schedule: Schedule, directory: Path) -> list[tuple[str, str]]:
    """What a person wants to see before a run begins."""
    config, data, plan = parts.config, parts.data, parts.plan
    total, trained = count_parameters(parts.module)
    parameters = f"{total:,} parameters" + (f", {trained:,} trained" if trained != total else "")
    sizes = [f"{len(data.train):,} train", *([f"{len(data.val):,} val"] if data.val is not None else [])]
    classes = [f"{len(data.classes)} classes"] if data.classes else []
    facts = [
        ("run", str(directory)),
        ("model", f"{config.model.name} · {parameters}"),
        ("data", " · ".join([data.name, *sizes, *classes])),
        ("batch", batch_arithmetic(plan)),
        ("optimizer", f"{config.optimizer.name} · lr {config.optimizer.lr:g}"),
        ("schedule", schedule.describe()),
        ("length", f"{plan.total_steps:,} steps · {plan.steps_per_epoch:,} an epoch"),
        (
            "device",
            f"{parts.ranks.count} × {_device_name(parts.ranks.device)} · {config.train.precision}",
        ),
    ]
    if parts.bitwise:
        facts.append(("bitwise", SETTINGS))
    return facts + ([("note", data.note)] if data.note else [])


def batch_arithmetic(plan: Plan) -> str:
    """A full step in numbers: `64 = 8 × 8 on 3 processes: 3+3+2`."""
    step = plan.step(0)
    cuts = len(step.micro_batches)
    sizes = sorted({stop - start for start, stop in step.micro_batches}, reverse=True)
    text = (
        f"{step.size} = {cuts} × {sizes[0]}"
        if len(sizes) == 1
        else f"{step.size} in {cuts} of {sizes[0]} or {sizes[1]}"
    )
    if plan.ranks == 1:
        return f"{text} on 1 process"
    shares = [stop - start for start, stop in step.ranks]
    shown = "+".join(map(str, shares)) if len(shares) <= 8 else f"{shares[0]} to {shares[-1]} each"
    return f"{text} on {plan.ranks} processes: {shown}"


def summary(parts: Parts) -> dict[str, Any]:
    """What `summary.json` holds."""
    progress = parts.progress
    parameters = dict(parts.module.named_parameters())
    return {
        "best": progress.best,
        "best_epoch": progress.best_epoch,
        "best_metric": parts.config.best.metric,
        "steps": progress.step,
        "samples_seen": progress.samples_seen,
        "world_size": parts.ranks.count,
        "seconds": progress.seconds,
        "weights_sha256": tensors_sha256(parameters),
        "buffers_sha256": tensors_sha256(dict(parts.module.named_buffers())),
        "optimizer_sha256": tensors_sha256(named_state(parts.optimizer, parts.module)[0]),
    }


def closing(values: dict[str, Any], directory: Path) -> list[tuple[str, str]]:
    """What a person wants to see when a run is over."""
    best = (
        "none"
        if values["best"] is None
        else f"{values['best_metric']} {values['best']:.4f} in epoch {values['best_epoch']}"
    )
    minutes, seconds = divmod(values["seconds"], 60)
    return [
        ("best", best),
        ("elapsed", f"{minutes:.0f} min {seconds:.1f} s" if minutes else f"{seconds:.1f} s"),
        ("trained", f"{values['steps']:,} steps · {values['samples_seen']:,} samples"),
        ("weights", values["weights_sha256"][:16]),
        ("files", str(directory)),
    ]


def draw_batch(parts: Parts, directory: Path) -> dict[str, Path]:
    """Draw samples of the first batch with their labels, where they are images."""
    batch = parts.train_loader.peek(parts.plan.permutation(0)[: min(64, parts.plan.batch_size)])
    if not _are_images(batch.inputs):
        return {}
    path = directory / "figures" / "batch.png"
    path.parent.mkdir(exist_ok=True)
    labels = [_label(target, parts.data.classes) for target in batch.targets]
    figures.batch_grid(parts.train_loader.normalize.undo(batch.inputs), labels, path)
    return {"batch": path}


def draw(parts: Parts, directory: Path) -> dict[str, Path]:
    """Draw the run's figures by its best model. A collective; the main process gets their paths."""
    decisions = _best_decisions(parts)
    drawn: dict[str, Path] = {}
    if not parts.ranks.is_main:
        return drawn
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)

    def path(name: str) -> Path:
        drawn[name] = folder / f"{name}.png"
        return drawn[name]

    figures.curves(read_rows(directory / "metrics.jsonl"), path("curves"))
    names = parts.data.classes
    if decisions and parts.val_loader is not None:
        shown = decisions[:SHOWN]
        images = parts.val_loader.peek([d.sample_id for d in shown]).inputs
        if _are_images(images):
            figures.predictions(
                parts.val_loader.normalize.undo(images),
                [_label(d.predicted, names) for d in shown],
                [_label(d.true, names) for d in shown],
                [d.confidence for d in shown],
                path("predictions"),
            )
        matrix = confusion(decisions, len(names) if names else None)
        classes = [_label(i, names) for i in range(len(matrix))]
        figures.confusion_matrix(matrix, classes, path("confusion_matrix"))
        drawn["per_class"] = folder / "per_class.csv"
        write_text(drawn["per_class"], per_class(matrix, classes))
    return drawn


def _best_decisions(parts: Parts) -> list[Decision]:
    """The best model's decisions over the validation data; the last model is put back after them."""
    if parts.evaluator is None or parts.progress.best is None:
        return []
    last = checkpoint.snapshot(parts.module)
    parts.load_best()
    decisions = parts.evaluator.decisions()
    parts.module.load_state_dict(last)
    return decisions


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


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
