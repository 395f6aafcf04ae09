"""Whether the host waits for the device, and the copies for the computation; and whether the pixels are right."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.check import ON_GPU_ONLY, Answer, Setting, Unanswered
from benchmarks.subjects import noise, patterns, settings
from trainer import Trainer
from trainer.components.models import small_cnn
from trainer.config.data_section import DataConfig
from trainer.data.datasets import Datasets, ImageArrays
from trainer.data.loading import Loader, build_loaders
from trainer.data.requests import whole_requests
from trainer.exact.plan import Step

STEPS = 12
FIRST_STEPS = 2  # in which some constants are moved to the device, once
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, clipped": {"train__precision": "bf16", "train__max_grad_norm": 1.0},
    "fp16": {"train__precision": "fp16"},
    "2 loader workers": {"data__workers": 2},
    "fuse=4": {"batch__fuse": 4},
    "channels_last": {"train__channels_last": True},
    "Adam": {"optimizer__name": "adamw", "optimizer__momentum": None},
    "bitwise": {"run__reproducibility": "bitwise", "train__max_grad_norm": 1.0},
}
REHEARSED = ("bf16, clipped", "2 loader workers", "Adam")


def host_waits(setting: Setting) -> Answer:
    """No step waits for the device, nor does the meter when it sums what it holds: only `Trainer.measure` does."""
    waits: dict[str, list[str]] = {}
    for name, changes in RUNS.items():
        if setting.on_gpu or name in REHEARSED:
            waits[name] = _waits_of_a_run(setting, name, changes)
    if not setting.on_gpu:
        raise Unanswered(ON_GPU_ONLY)
    with _host_waits(setting.device) as seen:
        torch.zeros(1, device=setting.device).item()
    if not seen:
        return Answer("torch does not report a wait that is there", passed=False)
    places = [
        f"{name}: {', '.join(sorted(set(found)))}"
        for name, found in waits.items()
        if found
    ]
    text = "; ".join(places) or f"none in {STEPS} steps of each of {len(waits)} runs"
    return Answer(text, {"waits": waits}, passed=not places)


def _waits_of_a_run(setting: Setting, name: str, changes: dict[str, Any]) -> list[str]:
    found: list[str] = []

    class Watched(Trainer):
        def train_step(self, step: Step) -> None:
            with _host_waits(setting.device) as seen:
                super().train_step(step)
                self.meter.flush()  # as by itself, once much is held back
            if step.number > FIRST_STEPS:
                found.extend(seen)

    config = settings(
        setting.directory / name.replace(" ", "-"),
        batch__micro_size=16,
        train__log_every=5,
        **changes,
    )
    Watched(config, model=small_cnn(10), train_data=patterns(64 * STEPS)).fit()
    return found


@contextmanager
def _host_waits(device: torch.device) -> Iterator[list[str]]:
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
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "called a synchronizing CUDA operation" in str(warning.message)
    ]


# ---------------------------------------------------------------- the side stream


def pixels(setting: Setting) -> Answer:
    """Copies on the side stream, pinned and not, give the CPU's bits, however far the device is behind."""
    data = noise(setting.pick(1024, 1024, 128), setting.pick(64, 64, 16))
    expected = _loaded(data, torch.device("cpu"), 0)
    equal = {
        workers: torch.equal(_loaded(data, setting.device, workers), expected)
        for workers in (0, 2)
    }
    texts = [
        f"{workers} workers: {'equal' if same else 'NOT equal'}"
        for workers, same in equal.items()
    ]
    return Answer(", ".join(texts), passed=all(equal.values()))


def _loaded(data: ImageArrays, device: torch.device, workers: int) -> Tensor:
    """All images as a loader gives them, with targets as a further pixel, on the CPU."""
    busy = torch.full((2048, 2048), 1 / 2048, device=device)
    kept = []
    for batch in _loader(data, device, workers).run(
        whole_requests(len(data), 32, 0, 1)
    ):
        if device.type != "cpu":
            for _ in range(20):
                # A buffer taken back too early would be overwritten while this runs.
                busy = busy @ busy
        kept.append(torch.cat([batch.inputs.flatten(1), batch.targets.unsqueeze(1)], 1))
    return torch.cat(kept).cpu()


def _loader(data: ImageArrays, device: torch.device, workers: int = 0) -> Loader:
    sets = Datasets(data, None, None, "noise")
    loader, _ = build_loaders(
        DataConfig(workers=workers), sets, seed=0, device=device, dtype=torch.float32
    )
    return loader


def copy_overlap(setting: Setting) -> Answer:
    """Copies of 150 MB alone, a computation as long alone, and both through the loader: how much runs at once."""
    samples = setting.pick(1024, 1024, 8)
    batches = setting.pick(30, 10, 3)
    side = setting.pick(224, 224, 16)
    batch = ImageArrays(*noise(samples, side).batch(torch.arange(samples)))
    if setting.on_gpu:
        # Pinned already, or the host's work would hide the device's.
        batch = ImageArrays(batch.images.pin_memory(), batch.targets.pin_memory())
    loader = _loader(_SameBatch(batch.images, batch.targets), setting.device)
    compute = _Computation(setting)

    def copy() -> None:
        for _ in range(batches):
            batch.images.to(setting.device, non_blocking=True)

    def both() -> None:
        for _ in loader.run(whole_requests(batches * samples, samples, 0, 1)):
            compute()

    normalize = loader.normalize
    images = batch.images.to(setting.device)

    def computation() -> None:
        for _ in range(batches):
            normalize(images)
            compute()

    copying = _seconds(setting, copy)
    compute.calibrate(setting, copying / batches)
    computing, together = _seconds(setting, computation), _seconds(setting, both)
    if not setting.on_gpu:
        raise Unanswered(ON_GPU_ONLY)
    overlap = (copying + computing - together) / min(copying, computing)
    rate = batches * batch.images.nbytes / copying / 1e9
    return Answer(
        f"{100 * overlap:.0f} % of the shorter one is hidden: copies "
        f"{1e3 * copying / batches:.2f} ms ({rate:.1f} GB/s), "
        f"computation {1e3 * computing / batches:.2f} ms, together {1e3 * together / batches:.2f} ms a micro-batch",
        {
            "hidden_share": overlap,
            "copy_seconds": copying / batches,
            "compute_seconds": computing / batches,
            "together_seconds": together / batches,
            "gigabytes_per_second": rate,
        },
    )


class _SameBatch(ImageArrays):
    """As long as wanted; every micro-batch is the whole of the images, which are not copied on the host."""

    def __len__(self) -> int:
        return 1 << 30

    def batch(self, ids: Any) -> tuple[Tensor, Tensor]:
        return self.images, self.targets


class _Computation:
    """Matrix products on the device, as many as take some time."""

    def __init__(self, setting: Setting) -> None:
        side = setting.pick(4096, 4096, 64)
        dtype = torch.bfloat16 if setting.on_gpu else torch.float32
        self._matrix = torch.full((side, side), 1 / side, device=setting.device).to(
            dtype
        )
        self._count = 1

    def __call__(self) -> None:
        for _ in range(self._count):
            self._matrix = self._matrix @ self._matrix

    def calibrate(self, setting: Setting, seconds: float) -> None:
        trials = setting.pick(50, 50, 2)
        self._count = trials
        of_one = _seconds(setting, self) / trials
        self._count = max(1, min(round(seconds / of_one), 1000))


def _seconds(setting: Setting, action: Callable[[], object]) -> float:
    """The shorter of two times, after one that does not count."""
    times = []
    for _ in range(3):
        _synchronize(setting)
        start = time.perf_counter()
        action()
        _synchronize(setting)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _synchronize(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()
