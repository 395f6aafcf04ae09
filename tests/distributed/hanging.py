"""A small program that waits where the command line says, in its data, model, writer or evaluation.

python hanging.py DIRECTORY WHERE SECONDS section__key=value …
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import yaml
from torch import Tensor, nn

from tests.distributed.small import Points, config, mlp
from trainer import Trainer
from trainer.process import store, watchdog
from trainer.process.exit import exit_process, report_error
from trainer.storage import checkpoint

WHERE, SECONDS = sys.argv[2], float(sys.argv[3])
RANK = os.environ.get("RANK", "0")
LAST_RANK = int(os.environ.get("WORLD_SIZE", "1")) - 1


class Data(Points):
    def __init__(self, waits: bool) -> None:
        if WHERE == "start":
            wait_here()
        super().__init__(56, ignored=False)
        self.waits = waits

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if self.waits and i == 20:
            wait_here()
        return super().__getitem__(i)


class Net(nn.Module):
    """A small net, of which a rank waits or works in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.calls = 0

    def forward(self, points: Tensor) -> Tensor:
        self.calls += 1
        if WHERE == "first step" and self.calls == 1:
            work_here()
        if WHERE == "model" and self.calls == 6 and int(RANK) == LAST_RANK:
            wait_here()
        output: Tensor = self.layers(points)
        return output


class SlowData(Points):
    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if WHERE == "evaluation":
            time.sleep(SECONDS)
        return super().__getitem__(i)


def wait_here() -> None:
    Path(sys.argv[1], f"waits{RANK}").write_text(str(os.getpid()))
    time.sleep(SECONDS)


def work_here() -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pass


def main() -> int:
    # So that the tests need not wait as long as people do.
    watchdog.STOP_GRACE = 2.0
    store.SECONDS_TO_ANSWER = 1.0
    changes = {"batch__micro_size": 7, "batch__fuse": 1, "train__epochs": 3}
    for argument in sys.argv[4:]:
        name, _, value = argument.partition("=")
        changes[name] = yaml.safe_load(value)
    settings = config(Path(sys.argv[1]), **changes)
    if WHERE == "writer":
        checkpoint.write = lambda *_, **__: wait_here()  # type: ignore[assignment]
    try:
        trainer = Trainer(
            settings,
            model=Net(),
            train_data=Data(WHERE == "loader"),
            val_data=SlowData(28, ignored=False),
        )
        trainer.fit()
        trainer.ranks.close()
    except Exception as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    exit_process(main())
