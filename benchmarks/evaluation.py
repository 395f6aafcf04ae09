"""The time of an evaluation: Lockstep's beside loops by hand that count the loss and the right answers.

python -m benchmarks.evaluation                         half a minute
python -m benchmarks.evaluation --quick

All evaluate the same net on the same data in memory, in batches of the same size, in turn, in one process. The lean
loop sums on the device and reads once in the end; the usual one reads the loss and the count of every batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.page import page_parser, write_page
from benchmarks.resnet import resnet18
from benchmarks.subjects import first_digits, noise, settings
from trainer import Trainer
from trainer.components.models import small_cnn
from trainer.data.datasets import ImageArrays
from trainer.process.exit import exit_process

BASE = "lean loop"
Answer = tuple[float, float]  # mean loss, accuracy
TOLERANCE = 1e-5


class Subject(NamedTuple):
    """What is evaluated, in batches of `batch`, `repeats` times in a round."""

    name: str
    make_model: Callable[[], nn.Module]
    make_data: Callable[[], ImageArrays]
    batch: int
    repeats: int


SUBJECTS = (
    Subject(
        "small_cnn, 1,280 digits by 256",
        lambda: small_cnn(10),
        lambda: first_digits(1280),
        256,
        3,
    ),
    Subject(
        "ResNet-18, 64 images of 64 × 64 by 32",
        lambda: resnet18(10),
        lambda: noise(64, 64),
        32,
        1,
    ),
)


def lean(model: nn.Module, data: ImageArrays, batch: int) -> Answer:
    """Sums stay on the device until the end."""
    total, right = torch.zeros(()), torch.zeros(())
    for inputs, targets in _batches(data, batch):
        output = model(inputs)
        total += F.cross_entropy(output, targets, reduction="sum")
        right += (output.argmax(1) == targets).sum()
    return total.item() / len(data), right.item() / len(data)


def usual(model: nn.Module, data: ImageArrays, batch: int) -> Answer:
    """Both are read after each batch."""
    total, right = 0.0, 0
    for inputs, targets in _batches(data, batch):
        output = model(inputs)
        total += F.cross_entropy(output, targets).item() * len(targets)
        right += int((output.argmax(1) == targets).sum().item())
    return total / len(data), right / len(data)


def _batches(data: ImageArrays, batch: int) -> Any:
    for ids in torch.arange(len(data)).split(batch):
        images, targets = data.batch(ids)
        yield images.float().div_(255), targets


def measure(subject: Subject, rounds: int) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds of an evaluation by each way, `(rounds, 2)`, on the wall and of CPU time.

    Raises `RuntimeError` if they do not find the same.
    """
    data, model = subject.make_data(), subject.make_model()
    with TemporaryDirectory() as directory, redirect_stdout(StringIO()):
        config = settings(Path(directory), batch__size=subject.batch)
        trainer = Trainer(config, model=model, train_data=data, val_data=data)
        torch.set_num_threads(1)

        def by_hand(way: Callable[[nn.Module, ImageArrays, int], Answer]) -> Answer:
            with torch.no_grad():
                model.eval()
                return way(model, data, subject.batch)

        def lockstep() -> Answer:
            row = trainer.evaluate()
            return float(row["loss"]), float(row["accuracy"])

        ways: dict[str, Callable[[], Answer]] = {
            BASE: lambda: by_hand(lean),
            "usual loop, with .item()": lambda: by_hand(usual),
            "Lockstep": lockstep,
        }
        answers = {name: way() for name, way in ways.items()}
        _refuse_differences(answers)
        return _in_turn(ways, rounds, subject.repeats)


def _refuse_differences(answers: Mapping[str, Answer]) -> None:
    for name, answer in answers.items():
        if not np.allclose(answer, answers[BASE], rtol=TOLERANCE, atol=TOLERANCE):
            raise RuntimeError(f"{name} finds {answer}, the {BASE} {answers[BASE]}")


def _in_turn(
    ways: Mapping[str, Callable[[], Answer]], rounds: int, repeats: int
) -> dict[str, np.ndarray[Any, Any]]:
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            began = perf_counter(), process_time()
            for _ in range(repeats):
                ways[name]()
            spent = [perf_counter() - began[0], process_time() - began[1]]
            seconds[name].append([each / repeats for each in spent])
    return {name: np.array(of_rounds) for name, of_rounds in seconds.items()}


def table(seconds: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Markdown: medians, and quartiles of the ratio round by round."""
    lines = [
        f"| way | ms | × {BASE} | half of the rounds | × CPU time |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, spent in seconds.items():
        quotients = np.percentile(spent / seconds[BASE], [25, 50, 75], axis=0)
        low, middle, high = quotients
        milliseconds = 1e3 * float(np.median(spent[:, 0]))
        cells = [name, f"{milliseconds:.1f}", f"{middle[0]:.2f}"]
        cells += [f"{low[0]:.2f} to {high[0]:.2f}", f"{middle[1]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = page_parser("evaluation", __doc__, rounds=25, quick="five rounds")
    options = parser.parse_args(arguments)
    rounds = 5 if options.quick else options.rounds
    sections = (
        f"## {subject.name}\n\n{table(measure(subject, rounds))}"
        for subject in SUBJECTS
    )
    return write_page("The time of an evaluation", sections, options.save)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
