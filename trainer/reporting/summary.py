"""What a run says of itself: the header's facts, the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from trainer.components.models import count_parameters
from trainer.components.optimizer import named_state
from trainer.components.schedule import Schedule
from trainer.core.build import Run
from trainer.exact.determinism import SUMMARY as BITWISE_SETTINGS
from trainer.exact.plan import Plan
from trainer.storage.checkpoint import Progress
from trainer.storage.sha256 import tensors_sha256


def header(run: Run, schedule: Schedule, fuse: int, fuse_note: str, directory: Path) -> list[tuple[str, str]]:
    """What a person wants to see before a run begins."""
    config, data, plan = run.config, run.data, run.plan
    total, trained = count_parameters(run.module)
    parameters = f"{total:,} parameters" + (f", {trained:,} trained" if trained != total else "")
    sizes = [f"{len(data.train):,} train", *([f"{len(data.val):,} val"] if data.val is not None else [])]
    classes = [f"{len(data.classes)} classes"] if data.classes else []
    facts = [
        ("run", str(directory)),
        ("model", f"{config.model.name} · {parameters}"),
        *([("weights", run.weights_note)] if run.weights_note else []),
        ("data", " · ".join([data.name, *sizes, *classes])),
        ("batch", batch_arithmetic(plan, fuse)),
        ("optimizer", f"{config.optimizer.name} · lr {config.optimizer.lr:g}"),
        ("schedule", schedule.describe()),
        ("length", f"{plan.total_steps:,} steps · {plan.steps_per_epoch:,} an epoch"),
        (
            "device",
            f"{run.ranks.count} × {_device_name(run.ranks.device)} · {config.train.precision}",
        ),
    ]
    if fuse_note:
        facts.append(("fuse", f"1: {fuse_note}"))
    if run.bitwise:
        facts.append(("bitwise", BITWISE_SETTINGS))
    return facts + ([("note", data.note)] if data.note else [])


def batch_arithmetic(plan: Plan, fuse: int = 1) -> str:
    """A full step in numbers: `64 = 8 × 8 on 3 processes: 3+3+2`; `, up to 2 at once` where a forward runs several."""
    step = plan.step(0)
    cuts = len(step.micro_batches)
    sizes = sorted({stop - start for start, stop in step.micro_batches}, reverse=True)
    text = (
        f"{step.size} = {cuts} × {sizes[0]}"
        if len(sizes) == 1
        else f"{step.size} in {cuts} of {sizes[0]} or {sizes[1]}"
    )
    largest = max(stop - start for rank in range(plan.ranks) for start, stop in plan.groups(step, rank, fuse))
    at_once = f", up to {largest} at once" if largest > 1 else ""
    if plan.ranks == 1:
        return f"{text} on 1 process{at_once}"
    shares = [stop - start for start, stop in step.ranks]
    shown = "+".join(map(str, shares)) if len(shares) <= 8 else f"{shares[0]} to {shares[-1]} each"
    return f"{text} on {plan.ranks} processes: {shown}{at_once}"


def summary(run: Run, progress: Progress, optimizer: Optimizer) -> dict[str, Any]:
    """What `summary.json` holds."""
    parameters = dict(run.module.named_parameters())
    return {
        "best": progress.best,
        "best_epoch": progress.best_epoch,
        "best_metric": run.config.best.metric,
        "steps": progress.step,
        "samples_seen": progress.samples_seen,
        "world_size": run.ranks.count,
        "seconds": progress.seconds,
        "weights_sha256": tensors_sha256(parameters),
        "buffers_sha256": tensors_sha256(dict(run.module.named_buffers())),
        "optimizer_sha256": tensors_sha256(named_state(optimizer, run.module)[0]),
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


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
