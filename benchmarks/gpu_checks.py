"""The checks that `benchmarks.gpu` runs. Each gets the device and an empty directory, and gives a verdict.

On the CPU they run the same code on less, and say of what only CUDA has that it was not checked.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.loops import Work, raw
from benchmarks.processes import on_processes
from benchmarks.step_time import measure, workloads
from benchmarks.subjects import SGD, first_digits, fitted, noise, resnet18, settings
from benchmarks.timing import LOCKSTEP, InterleavedTrainer, Rounds, Seconds, quartiles
from trainer import Config, Trainer
from trainer.components.models import small_cnn
from trainer.config.schema import DataConfig
from trainer.core.precision import AUTOCAST
from trainer.data.datasets import Datasets, ImageArrays
from trainer.data.loading import build_loaders, whole_requests
from trainer.exact.plan import Step
from trainer.process.ranks import Ranks
from trainer.reporting.jsonl import read_rows

Verdict = tuple[bool | None, str]  # passed, failed or (None) not checked; the figures
EQUAL = 1e-12  # relative, in fp64

# ---------------------------------------------------------------- speed and memory


def resnet_step_time(device: torch.device, directory: Path) -> Verdict:
    """ResNet-18, bf16, 256 samples a step in one micro-batch: at most 1.05 × the loop by hand."""
    batch, side, rounds = (
        (256, 128, Rounds(8, 5)) if device.type == "cuda" else (4, 32, Rounds(2, 1))
    )
    data = noise(rounds.total_steps * batch, side)
    config = settings(directory, batch__size=batch, train__precision="bf16")
    trainer = InterleavedTrainer(config, model=resnet18(), train_data=data)
    work = Work(resnet18, data, batch, batch, SGD, trainer.ranks, AUTOCAST["bf16"])
    return _faster(device, trainer.fit_with({"raw": raw(work)}, rounds))


def tiny_step_time(device: torch.device, directory: Path) -> Verdict:
    """A net so small that the loop's own work is most of the step: at most 1.05 × the loop by hand."""
    rounds = Rounds(20, 50) if device.type == "cuda" else Rounds(2, 2)
    return _faster(
        device,
        measure(workloads()[0], rounds, {"raw": raw}, threads=torch.get_num_threads()),
    )


def _faster(device: torch.device, seconds: Seconds) -> Verdict:
    low, middle, high = quartiles(seconds, LOCKSTEP, "raw")[:, 0]
    microseconds = (
        1e6
        * sorted(clocks[0] for clocks in seconds[LOCKSTEP])[len(seconds[LOCKSTEP]) // 2]
    )
    figures = f"{middle:.3f} × raw, {low:.3f} to {high:.3f} in half of the rounds, {microseconds:.0f} µs a step"
    return (bool(middle <= 1.05) if device.type == "cuda" else None), figures


def peak_memory(device: torch.device, directory: Path) -> Verdict:
    """ResNet-18, bf16, 256 samples a step: at most 1.02 × the peak of the loop by hand."""
    steps, batch, side = (24, 256, 128) if device.type == "cuda" else (2, 4, 32)
    data = noise(steps * batch, side)
    config = settings(directory, batch__size=batch, train__precision="bf16")
    work = Work(resnet18, data, batch, batch, SGD, Ranks("bf16"), AUTOCAST["bf16"])

    def by_hand() -> None:
        for _ in islice(raw(work), steps):
            pass

    by_hand()  # libraries allocate their workspaces once, and keep them
    theirs = _peak_bytes(by_hand)
    ours = _peak_bytes(lambda: Trainer(config, model=resnet18(), train_data=data).fit())
    if device.type != "cuda":
        return None, "measured on CUDA only"
    return (
        ours <= 1.02 * theirs,
        f"{ours / theirs:.4f} × raw ({ours / 2**20:.0f} and {theirs / 2**20:.0f} MiB)",
    )


def _peak_bytes(action: Callable[[], object]) -> int:
    """The most memory that `action` had at once on the device, beyond what was held before."""
    gc.collect()
    if not torch.cuda.is_available():
        action()
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    return torch.cuda.max_memory_allocated() - before


# ---------------------------------------------------------------- no waiting, and the right pixels


def host_syncs(device: torch.device, directory: Path) -> Verdict:
    """No step waits for the device, nor does the meter when it sums what it holds: only `Trainer.log` does."""
    found: list[str] = []

    class Watched(Trainer):
        def train_step(self, step: Step) -> None:
            with _syncs(device) as seen:
                super().train_step(step)
                self.meter.flush()  # as by itself, once much is held back
            if step.number > 2:  # a few constants are moved to the device once
                found.extend(seen)

    changes = {
        "batch__micro_size": 16,
        "train__precision": "bf16",
        "train__max_grad_norm": 1.0,
    }
    for workers in (0, 2):
        config = settings(
            directory / str(workers),
            data__workers=workers,
            train__log_every=5,
            **changes,
        )
        Watched(config, model=small_cnn(10), train_data=first_digits(64 * 12)).fit()
    if device.type != "cuda":
        return None, "seen on CUDA only"
    with _syncs(device) as seen:
        torch.zeros(1, device=device).item()
    if not seen:
        return False, "torch's own check does not see a sync that is there"
    return not found, f"{len(found)} in 20 steps" + "".join(
        f", {place}" for place in sorted(set(found))
    )


@contextmanager
def _syncs(device: torch.device) -> Iterator[list[str]]:
    """Where the body makes the host wait for the device: `file:line` of each, once the body has ended."""
    seen: list[str] = []
    if device.type != "cuda":
        yield seen
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seen += [
        f"{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "called a synchronizing CUDA operation" in str(w.message)
    ]


def pixels(device: torch.device, directory: Path) -> Verdict:
    """Copies on the side stream, pinned and not, give the CPU's bits, however far the device is behind."""
    data = noise(1024, 64)
    expected = _loaded(data, torch.device("cpu"), 0)
    equal = {
        workers: torch.equal(_loaded(data, device, workers), expected)
        for workers in (0, 2)
    }
    return all(equal.values()), ", ".join(
        f"{workers} workers: {'equal' if same else 'NOT equal'}"
        for workers, same in equal.items()
    )


def _loaded(data: ImageArrays, device: torch.device, workers: int) -> Tensor:
    """All images as a loader gives them, with targets as a further pixel, on the CPU."""
    sets = Datasets(data, None, None, "noise")
    loader, _ = build_loaders(
        DataConfig(workers=workers), sets, seed=0, device=device, dtype=torch.float32
    )
    busy = torch.full((2048, 2048), 1 / 2048, device=device)
    kept = []
    for batch in loader.run(whole_requests(len(data), 32, 0, 1)):
        for _ in range(20 if device.type == "cuda" else 0):
            # A buffer taken back too early would be overwritten while this runs.
            busy = busy @ busy
        kept.append(torch.cat([batch.inputs.flatten(1), batch.targets.unsqueeze(1)], 1))
    return torch.cat(kept).cpu()


# ---------------------------------------------------------------- precision


def fp16(device: torch.device, directory: Path) -> Verdict:
    """fp16 with its gradient scaler learns."""
    return _learns(directory, train__precision="fp16")


def bf16(device: torch.device, directory: Path) -> Verdict:
    """bf16 learns."""
    return _learns(directory, train__precision="bf16")


def compiled(device: torch.device, directory: Path) -> Verdict:
    """A compiled model learns."""
    return (
        _learns(directory, train__compile=True)
        if device.type == "cuda"
        else (None, "compiled on CUDA only")
    )


def _learns(directory: Path, **changes: Any) -> Verdict:
    trainer = fitted(
        settings(directory, train__epochs=3, **changes),
        lambda: small_cnn(10),
        first_digits(1280),
    )
    rows = read_rows(directory / "run" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    scaler = trainer.run.precision.scaler
    scale = f", loss scale {scaler.get_scale():.0f}" if scaler else ""
    whole = all(p.dtype is torch.float32 for p in trainer.module.parameters())
    learnt = all(map(math.isfinite, losses)) and losses[-1] < 0.5 * losses[0]
    return (
        learnt and whole,
        f"loss {losses[0]:.3f} → {losses[-1]:.3f}{scale}, weights {'' if whole else 'NOT '}fp32",
    )


# ---------------------------------------------------------------- equal runs, in fp64


def two_processes(device: torch.device, directory: Path) -> Verdict:
    """Two processes that share the device, over gloo, end with the weights and statistics of one."""
    return _equal(*_on_two_and_one(device, directory, train__precision="fp64"))


def bitwise(device: torch.device, directory: Path) -> Verdict:
    """In fp32 and bitwise mode, they do so to the last bit."""
    two, one = _on_two_and_one(device, directory, run__reproducibility="bitwise")
    other = [name for name, tensor in one.items() if not torch.equal(two[name], tensor)]
    return (
        not other,
        f"{len(one) - len(other)} of {len(one)} tensors have the same bits {' '.join(other[:3])}".strip(),
    )


def _on_two_and_one(
    device: torch.device,
    directory: Path,
    on_two: dict[str, Any] | None = None,
    **changes: Any,
) -> list[Mapping[str, Tensor]]:
    """The end of the same run on two processes, with `on_two` changed besides, and on one."""
    ends = []
    for count, more in ((2, on_two or {}), (1, {})):
        config = settings(
            directory / str(count), **{"batch__micro_size": 8, **changes, **more}
        )
        ends.append(
            on_processes(count, _trained, config, device.type, device=device.type)[0]
        )
    return ends


def _trained(config: Config, device_type: str) -> dict[str, Tensor]:
    """21 steps, the last of a single micro-batch, so that one of two ranks has nothing to do in it."""
    trainer = fitted(config, lambda: small_cnn(10), first_digits(64 * 20 + 5))
    assert trainer.ranks.device.type == device_type
    return {name: tensor.cpu() for name, tensor in trainer.module.state_dict().items()}


def fused(device: torch.device, directory: Path) -> Verdict:
    """8 micro-batches in one forward are those 8 one by one, BatchNorm and dropout included."""
    states = []
    for fuse in (8, 1):
        config = settings(
            directory / str(fuse),
            batch__micro_size=8,
            batch__fuse=fuse,
            train__precision="fp64",
        )
        states.append(
            fitted(config, _with_dropout, first_digits(640)).module.state_dict()
        )
    return _equal(*states)


def _with_dropout() -> nn.Module:
    return nn.Sequential(small_cnn(64), nn.Dropout(0.3), nn.Linear(64, 10))


def sync_batch_norm(device: torch.device, directory: Path) -> Verdict:
    """`batch_norm.mode=sync` on one process is `micro`."""
    states = []
    for mode in ("sync", "micro"):
        config = settings(
            directory / mode,
            batch__micro_size=32,
            batch_norm__mode=mode,
            train__precision="fp64",
        )
        states.append(
            fitted(config, lambda: small_cnn(10), first_digits(640)).module.state_dict()
        )
    return _equal(*states)


def sync_on_two(device: torch.device, directory: Path) -> Verdict:
    """With it, a micro-batch on each of two processes is one of twice the size on one."""
    if device.type != "cuda":
        return None, "torch's SyncBatchNorm runs on CUDA only"
    sync = {"batch_norm__mode": "sync", "batch__micro_size": 32}
    changes = {
        "batch__micro_size": 64,
        "batch_norm__momentum_per": "step",
        "train__precision": "fp64",
    }
    return _equal(*_on_two_and_one(device, directory, sync, **changes))


def resume(device: torch.device, directory: Path) -> Verdict:
    """A run stopped after 7 of 15 steps, and gone on with, ends as one that was not, dropout and all."""
    states = []
    for name, stops in {"stopped": (7, 15), "straight": (15,)}.items():
        for stop in stops:
            changes = {
                "train__max_steps": stop,
                "train__precision": "fp64",
                "run__resume": "auto",
            }
            trainer = fitted(
                settings(directory / name, batch__micro_size=16, **changes),
                _with_dropout,
                first_digits(64 * 20),
            )
        states.append(trainer.module.state_dict())
    return _equal(*states)


def _equal(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Verdict:
    """Whether all tensors are equal but for rounding: the largest difference, relative to each tensor's largest."""
    differences = {
        name: float(
            (state[name].cpu() - tensor.cpu()).abs().max()
            / tensor.cpu().abs().max().clamp(min=1e-300)
        )
        for name, tensor in reference.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    return differences[
        worst
    ] <= EQUAL, f"largest relative difference {differences[worst]:.1e}, in {worst}"
