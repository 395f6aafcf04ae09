"""`configs/cifar10_fast.yaml`: how long its epochs take on this device and, with the images, what it learns."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks.gpu.check import Answer, Setting, Unanswered
from trainer import Observer, Trainer, load
from trainer.core.metrics import Row
from trainer.exact.plan import Step

CONFIG = "configs/cifar10_fast.yaml"
TRAIN_IMAGES, VAL_IMAGES = 50_000, 10_000  # CIFAR-10's
TARGET = 0.94


class EpochClock(Observer):
    """Notes when each epoch has ended, its evaluation and row included: by then the host has waited for the device."""

    may_stop = False

    def __init__(self) -> None:
        self.times: list[float] = []

    def epoch(self, step: Step, row: Row) -> None:
        self.times.append(time.perf_counter())


def cifar10_fast(setting: Setting) -> Answer:
    """Seconds of an epoch after the first, which compiles; with the images of `--cifar10`, the accuracy."""
    changes: dict[str, Any] = {
        "run.dir": str(setting.directory / "run"),
        "run.figures": False,
        "wandb.mode": "disabled",
        **data_of(setting),
    }
    if not setting.on_gpu:
        changes |= {"model.width": 4, "train.compile": False, "batch.size": 64}
        changes |= {"train.epochs": 2, "run.proof": "off"}
    clock = EpochClock()
    trainer = Trainer(load(CONFIG, changes), observers=[clock])
    begin = time.perf_counter()
    trainer.fit()
    ends = clock.times
    epochs = [end - start for start, end in pairwise(ends)]
    values: dict[str, Any] = {
        "epochs": len(ends),
        "seconds": ends[-1] - begin,
        "epoch_seconds": median(epochs),
    }
    text = (
        f"{len(ends)} epochs in {values['seconds']:.1f} s with compilation, {values['epoch_seconds']:.2f} s each after "
        f"the first"
    )
    if setting.cifar10 is None:
        return Answer(f"{text}; --cifar10 FOLDER tells what it learns", values)
    values["accuracy"] = trainer.progress.best
    return Answer(f"{text}; accuracy {values['accuracy']:.4f}, aim {TARGET}", values)


def data_of(setting: Setting) -> dict[str, Any]:
    folder = setting.cifar10
    if folder is None:
        share = setting.pick(1, 1, 100)
        sizes = {"size": TRAIN_IMAGES // share, "val_size": VAL_IMAGES // share}
        return {
            "data.name": "fake",
            "data.root": None,
            "data.image_size": 32,
            **{f"data.{name}": size for name, size in sizes.items()},
        }
    if (folder / "cifar-10-batches-py").is_dir():
        return {"data.root": str(folder)}
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise Unanswered(
                f"{folder} has neither cifar-10-batches-py nor train/ and test/"
            )
    return {"data.root": str(folder), "data.name": "folder", "data.val_folder": "test"}
