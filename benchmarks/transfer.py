"""The two transfer recipes against a script in the form that tutorials have made common: accuracy and time.

python -m benchmarks.transfer DATA_ROOT                     ResNet-18, whose weights are downloaded if need be
python -m benchmarks.transfer DATA_ROOT --epochs 3 model.name=my_package.Net model.weights=PATH

The script: torchvision's ImageFolder, PIL images, v1 transforms, four loader processes, a training and a validation
phase in each epoch, a log by `.item()`, the best weights kept in a file. Network, initial weights, head, data, epochs,
batch, optimizer and schedule are the config's. The two take turns, an epoch each, each in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as v1

from benchmarks.step_time import machine
from benchmarks.timing import Clocks
from trainer import Config, Trainer, load
from trainer.components.heads import find_head
from trainer.components.models import build_model
from trainer.components.weights import start_from_weights, weights_file
from trainer.process.exit import report_error
from trainer.process.memory import keep_freed_memory

RECIPES = ("extract", "finetune")
CONFIGS = Path(__file__).parents[1] / "configs" / "transfer"


def initial_model(config: Config, classes: int) -> nn.Module:
    """The network as Lockstep begins with it."""
    model = build_model(
        config.model, seed=config.run.seed, num_classes=classes, in_channels=3
    )
    start_from_weights(
        weights_file(config.model, nullcontext),
        model,
        config.model,
        classes,
        config.run.seed,
    )
    return model


def by_hand(config: Config, best_file: Path) -> Iterator[float]:
    """The script; it yields each epoch's validation accuracy."""
    normalize = v1.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    transforms = {
        "train": v1.Compose(
            [
                v1.RandomResizedCrop(224),
                v1.RandomHorizontalFlip(),
                v1.ToTensor(),
                normalize,
            ]
        ),
        "val": v1.Compose(
            [v1.Resize(256), v1.CenterCrop(224), v1.ToTensor(), normalize]
        ),
    }
    folders = {
        phase: datasets.ImageFolder(str(Path(config.data.root or "", phase)), transform)
        for phase, transform in transforms.items()
    }
    loaders = {
        phase: DataLoader(folder, config.batch.size, shuffle=True, num_workers=4)
        for phase, folder in folders.items()
    }
    model = initial_model(config, len(folders["train"].classes))
    head = list(model.get_submodule(find_head(model, config.model.head)).parameters())
    of_head = {id(parameter) for parameter in head}
    backbone = [
        parameter for parameter in model.parameters() if id(parameter) not in of_head
    ]
    groups: list[dict[str, Any]] = [{"params": head}]
    if config.model.freeze:
        for parameter in backbone:
            parameter.requires_grad = False
    else:
        groups.append(
            {
                "params": backbone,
                "lr": config.optimizer.backbone_lr or config.optimizer.lr,
            }
        )
    optimizer = torch.optim.SGD(groups, config.optimizer.lr, **config.optimizer.args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, **config.schedule.args)
    criterion, best = nn.CrossEntropyLoss(), 0.0
    for _ in range(config.train.epochs):
        for phase, loader in loaders.items():
            model.train(phase == "train")
            loss_sum, correct = 0.0, 0
            for inputs, labels in loader:
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == "train"):
                    outputs = model(inputs)
                    loss = criterion(outputs, labels)
                    if phase == "train":
                        loss.backward()
                        optimizer.step()
                loss_sum += loss.item() * len(inputs)
                correct += int((outputs.argmax(1) == labels).sum())
            if phase == "train":
                scheduler.step()
            accuracy = correct / len(folders[phase])
            if phase == "val" and accuracy > best:
                best = accuracy
                torch.save(model.state_dict(), best_file)
        yield accuracy


def take_turns(config: Config, best_file: Path, threads: int, pipe: Connection) -> None:
    """The script in a process of its own: for each word received an epoch; it sends accuracy and all its seconds."""
    # Its loaders', as in a process started from a shell.
    set_start_method("fork", force=True)
    torch.set_num_threads(threads)
    script, spent = by_hand(config, best_file), np.zeros(2)
    while pipe.recv():
        began = clocks()
        accuracy = next(script)
        spent += clocks() - began
        pipe.send((accuracy, spent))


class Turns(Trainer):
    """A `Trainer` after each of whose epochs the script has one."""

    def race(self, script: Connection, began: Clocks) -> tuple[Clocks, Clocks, float]:
        """Train; the seconds since `began`, the script's, and its best accuracy."""
        keep_freed_memory(self.ranks.device.type)  # as `train.py` does
        self._script, self._waited = script, 0.0
        self._results: list[tuple[float, Clocks]] = []
        self.fit()
        spent = clocks() - began - [self._waited, 0]
        return (
            spent,
            self._results[-1][1],
            max(accuracy for accuracy, _ in self._results),
        )

    def save(self) -> None:
        super().save()
        self.finish_saving()  # the script is to have the machine to itself
        began = perf_counter()
        self._script.send(True)
        self._results.append(self._script.recv())
        self._waited += perf_counter() - began


def clocks() -> Clocks:
    """Seconds on the wall, and of CPU time, that of loader processes included once they have ended."""
    used = [
        resource.getrusage(who)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return np.array(
        [perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in used)]
    )


def compare(
    config: Config, directory: Path, threads: int
) -> list[tuple[str, float, Clocks]]:
    """Best accuracy and seconds of the script and of Lockstep."""
    spawning = get_context("spawn")
    ours, theirs = spawning.Pipe()
    other = spawning.Process(
        target=take_turns, args=(config, directory / "best.pth", threads, theirs)
    )
    other.start()
    try:
        began = clocks()
        trainer = Turns(config)
        torch.set_num_threads(threads)
        lockstep, script, accuracy = trainer.race(ours, began)
    finally:
        ours.send(False)
        other.join()
    return [
        ("script", accuracy, script),
        ("Lockstep", trainer.progress.best or 0.0, lockstep),
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", help="the folder with train/ and val/")
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="changes of the config, for both",
    )
    parser.add_argument(
        "--epochs", type=int, default=25, help="epochs of each run (default: 25)"
    )
    own = torch.get_num_threads()
    parser.add_argument(
        "--threads",
        type=int,
        default=own,
        help="threads of the process (default: torch's own)",
    )
    parser.add_argument(
        "--recipes",
        nargs="*",
        default=RECIPES,
        choices=RECIPES,
        help="which (default: both)",
    )
    options = parser.parse_intermixed_args(arguments)
    print(machine(options.threads), end="\n\n")
    print(
        "| recipe | loop | best accuracy | wall s | × | CPU s | × |\n|---|---|--:|--:|--:|--:|--:|"
    )
    torch.set_num_threads(options.threads)
    try:
        for recipe in options.recipes:
            with TemporaryDirectory() as directory:
                given = [
                    f"data.root={options.root}",
                    f"train.epochs={options.epochs}",
                    "train.keep_checkpoints=1",
                ]
                quiet = [
                    f"run.dir={directory}",
                    "run.figures=false",
                    "wandb.mode=disabled",
                ]
                config = load(
                    CONFIGS / f"{recipe}.yaml", [*given, *options.changes, *quiet]
                )
                with redirect_stdout(sys.stderr):
                    rows = compare(config, Path(directory), options.threads)
            for name, accuracy, seconds in rows:
                wall, cpu = (
                    f"{s:.1f} | {s / other:.2f}"
                    for s, other in zip(seconds, rows[0][2], strict=True)
                )
                print(
                    f"| {recipe} | {name} | {accuracy:.4f} | {wall} | {cpu} |",
                    flush=True,
                )
    except Exception as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
