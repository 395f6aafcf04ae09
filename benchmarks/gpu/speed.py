"""Images a second, next to a loop written by hand, and what the settings of a run cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.check import Answer, Setting, Unanswered
from benchmarks.loops import Work, raw
from benchmarks.processes import on_processes
from benchmarks.resnet import WIDTH, resnet18, resnet50
from benchmarks.step_time import mlp
from benchmarks.subjects import SGD, noise, settings
from benchmarks.timing import LOCKSTEP, InterleavedTrainer, Rounds, Seconds, quartiles
from trainer.core.precision import AUTOCAST
from trainer.data.datasets import ImageArrays

CLASSES = 1000
NARROW = 8  # channels, of a rehearsal's ResNets
MOST_OF_RAW = 1.05  # a step's time, in steps of the loop by hand: the aim


def resnet50_against_raw(setting: Setting, *, compiled: bool) -> Answer:
    """ResNet-50 in bf16, channels_last, 256 images of 224 × 224 a step."""
    if compiled and not setting.on_gpu:
        raise Unanswered("compiled on a GPU only")
    batch = setting.pick(256, 256, 4)
    rounds = setting.pick(Rounds(5, 5), Rounds(2, 3), Rounds(1, 1))
    data = noise(rounds.total_steps * batch, setting.pick(224, 224, 32), CLASSES)
    seconds = _against_raw(
        setting,
        partial(resnet50, CLASSES, width(setting)),
        data,
        rounds,
        batch=batch,
        compiled=compiled,
        channels_last=True,
    )
    return _share_of_raw(seconds, batch)


def resnet18_step(setting: Setting) -> Answer:
    """ResNet-18 in bf16, 256 images of 128 × 128 a step in one micro-batch."""
    batch = setting.pick(256, 256, 4)
    rounds = setting.pick(Rounds(8, 5), Rounds(2, 3), Rounds(1, 1))
    data = noise(rounds.total_steps * batch, setting.pick(128, 128, 32))
    make_model = partial(resnet18, 10, width(setting))
    return _share_of_raw(
        _against_raw(setting, make_model, data, rounds, batch=batch), batch
    )


def tiny_step(setting: Setting) -> Answer:
    """A net so small that the loop's own work is most of the step."""
    batch = 64
    rounds = setting.pick(Rounds(20, 50), Rounds(5, 50), Rounds(2, 2))
    images = torch.randint(
        256, (rounds.total_steps * batch, 1, 8, 8), dtype=torch.uint8
    )
    data = ImageArrays(images, torch.randint(10, (len(images),)))
    seconds = _against_raw(setting, mlp, data, rounds, batch=batch, precision="fp32")
    return _share_of_raw(seconds, batch)


def width(setting: Setting) -> int:
    """Channels of a ResNet's first stage."""
    return setting.pick(WIDTH, WIDTH, NARROW)


def _against_raw(
    setting: Setting,
    make_model: Callable[[], nn.Module],
    data: ImageArrays,
    rounds: Rounds,
    *,
    batch: int,
    precision: str = "bf16",
    channels_last: bool = False,
    compiled: bool = False,
) -> Seconds:
    config = settings(
        setting.directory,
        batch__size=batch,
        train__precision=precision,
        train__channels_last=channels_last,
        train__compile=compiled,
    )
    trainer = InterleavedTrainer(config, model=make_model(), train_data=data)
    work = Work(
        make_model,
        data,
        batch_size=batch,
        micro_size=batch,
        sgd=SGD,
        ranks=trainer.ranks,
        autocast=AUTOCAST.get(precision),
        channels_last=channels_last,
        compiled=compiled,
    )
    return trainer.fit_with({"raw": raw(work)}, rounds)


def _share_of_raw(seconds: Seconds, batch: int) -> Answer:
    ours, theirs = _images_per_second(seconds, batch), batch / _median(seconds["raw"])
    low, middle, high = (float(q) for q in quartiles(seconds, LOCKSTEP, "raw")[:, 0])
    aim = "within" if middle <= MOST_OF_RAW else "OVER"
    return Answer(
        f"{100 / middle:.1f} % of the raw loop's images/s ({ours:,.0f} and {theirs:,.0f}); a step takes {middle:.3f} × "
        f"raw, {low:.3f} to {high:.3f} in half of the rounds, {aim} the aim of {MOST_OF_RAW}",
        {
            "images_per_second": ours,
            "raw_images_per_second": theirs,
            "step_over_raw": middle,
            "quartiles": [low, high],
        },
    )


def _images_per_second(seconds: Seconds, batch: int) -> float:
    return batch / _median(seconds[LOCKSTEP])


def _median(clocks: list[Any]) -> float:
    return float(np.median([clock[0] for clock in clocks]))


# ---------------------------------------------------------------- what settings cost


def bitwise_cost(setting: Setting, *, precision: str, micro_batches: int) -> Answer:
    """ResNet-50, channels_last, 128 images a step, with TF32 in convolutions in both modes: bitwise over standard."""
    size = partial(_one_mode, setting, precision, micro_batches)
    device = setting.device_type
    # What a mode sets is of the whole process, so each has its own.
    standard, bitwise = (
        on_processes(1, size, mode, device=device)[0]
        for mode in ("standard", "bitwise")
    )
    return Answer(
        f"{standard / bitwise:.3f} × the time of a standard step ({bitwise:,.0f} and {standard:,.0f} images/s)",
        {
            "bitwise_over_standard": standard / bitwise,
            "standard_images_per_second": standard,
            "bitwise_images_per_second": bitwise,
        },
    )


def _one_mode(setting: Setting, precision: str, micro_batches: int, mode: str) -> float:
    """Images a second, with the same policy for TF32 in both modes."""
    batch = setting.pick(128, 128, 32)
    rounds = setting.pick(Rounds(3, 3), Rounds(1, 3), Rounds(1, 1))
    return _pace(
        setting,
        partial(resnet50, CLASSES, width(setting)),
        setting.pick(224, 224, 32),
        rounds,
        directory=setting.directory / mode,
        batch__size=batch,
        batch__micro_size=batch // micro_batches,
        train__precision=precision,
        train__channels_last=True,
        run__reproducibility=mode,
    )


def _pace(
    setting: Setting,
    make_model: Callable[[], nn.Module],
    side: int,
    rounds: Rounds,
    directory: Path,
    **changes: Any,
) -> float:
    """Lockstep's images a second on noise, with some settings."""
    return _paced(setting, make_model, side, rounds, directory, **changes)[0]


def _paced(
    setting: Setting,
    make_model: Callable[[], nn.Module],
    side: int,
    rounds: Rounds,
    directory: Path,
    **changes: Any,
) -> tuple[float, InterleavedTrainer]:
    """The same, and the trainer at its end."""
    batch = changes["batch__size"]
    data = noise(rounds.total_steps * batch, side, CLASSES)
    config = settings(directory, **changes)
    trainer = InterleavedTrainer(config, model=make_model(), train_data=data)
    return _images_per_second(trainer.fit_with({}, rounds), batch), trainer


def graphs_pace(setting: Setting) -> Answer:
    """ResNet-18 in bf16 at 32 × 32, 4 micro-batches of 8 images: kernels so short that the GPU waits for the host."""
    rounds = setting.pick(Rounds(4, 20), Rounds(2, 10), Rounds(1, 1))
    milliseconds = {}
    for is_replayed in (False, True):
        pace, trainer = _paced(
            setting,
            partial(resnet18, CLASSES, width(setting)),
            32,
            rounds,
            directory=setting.directory / str(is_replayed),
            batch__size=32,
            batch__micro_size=8,
            train__precision="bf16",
            train__cuda_graphs=is_replayed,
        )
        milliseconds[is_replayed] = 1000 * 32 / pace
    graphs = trainer.graphs
    reason = (
        "" if graphs is None or graphs.replays else f"; NOT replayed: {graphs.reason}"
    )
    eager, replayed = milliseconds[False], milliseconds[True]
    return Answer(
        f"a step takes {replayed:.2f} ms replayed and {eager:.2f} ms eager: {replayed / eager:.2f} ×{reason}",
        {"replayed_ms": replayed, "eager_ms": eager, "reason": reason},
    )


def fuse_pace(setting: Setting) -> Answer:
    """ResNet-18 in bf16 at 64 × 64, 8 micro-batches of 8 images: one at a time, and all in one forward."""
    rounds = setting.pick(Rounds(4, 10), Rounds(2, 5), Rounds(1, 1))
    paces = {
        fuse: _pace(
            setting,
            partial(resnet18, CLASSES, width(setting)),
            setting.pick(64, 64, 32),
            rounds,
            directory=setting.directory / str(fuse),
            batch__size=64,
            batch__micro_size=8,
            batch__fuse=fuse,
            train__precision="bf16",
        )
        for fuse in (1, 8)
    }
    return Answer(
        f"fuse=8 makes {paces[8] / paces[1]:.2f} × the images/s of fuse=1 ({paces[8]:,.0f} and {paces[1]:,.0f})",
        {
            "fuse_8_over_1": paces[8] / paces[1],
            "fuse_8_images_per_second": paces[8],
            "fuse_1_images_per_second": paces[1],
        },
    )
