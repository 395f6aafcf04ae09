"""Peak memory against the loop written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
from torch import nn

from benchmarks.gpu.check import ON_GPU_ONLY, Answer, Setting, Unanswered
from benchmarks.gpu.speed import CLASSES, width
from benchmarks.loops import Work, raw
from benchmarks.processes import on_processes
from benchmarks.subjects import SGD, noise, settings
from trainer import Trainer
from trainer.core.precision import AUTOCAST
from trainer.process.ranks import Ranks

MOST_OF_RAW = 1.02  # the aim
MIB = 2**20


def peak_memory(
    setting: Setting, make_model: Callable[..., nn.Module], side: int
) -> Answer:
    """256 images a step in bf16, channels_last, in one micro-batch: Lockstep's peak, in peaks of the raw loop."""
    measure = partial(_peak_of, setting, partial(make_model, CLASSES), side)
    device = setting.device_type
    # Libraries allocate their workspaces once in a process and keep them, so each loop has its own.
    theirs, ours = (
        on_processes(1, measure, by_hand, device=device)[0] for by_hand in (True, False)
    )
    if not setting.on_gpu:
        raise Unanswered(ON_GPU_ONLY)
    aim = "within" if ours <= MOST_OF_RAW * theirs else "OVER"
    return Answer(
        f"{ours / theirs:.4f} × the raw loop's ({ours / MIB:,.0f} and {theirs / MIB:,.0f} MiB), "
        f"{aim} the aim of {MOST_OF_RAW}",
        {"peak_over_raw": ours / theirs, "peak_bytes": ours, "raw_peak_bytes": theirs},
    )


def _peak_of(
    setting: Setting, make_model: Callable[..., nn.Module], side: int, by_hand: bool
) -> int:
    """The most bytes that the process had at once on the device."""
    steps, batch = setting.pick(12, 6, 2), setting.pick(256, 256, 4)
    data = noise(steps * batch, setting.pick(side, side, 32), CLASSES)
    make_model = partial(make_model, width=width(setting))
    if by_hand:
        ranks = Ranks("bf16")
        work = Work(make_model, data, batch, batch, SGD, ranks, AUTOCAST["bf16"], True)
        for _ in islice(raw(work), steps):
            pass
    else:
        config = settings(
            setting.directory,
            batch__size=batch,
            train__precision="bf16",
            train__channels_last=True,
        )
        Trainer(config, model=make_model(), train_data=data).fit()
    return torch.cuda.max_memory_allocated() if setting.on_gpu else 0
