"""What a check is, what it is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Where a check runs: on a GPU, on a GPU with a quarter of the work (`quick`), or as a rehearsal on the CPU.

    `directory` is empty, and the check's own. `cifar10` is where CIFAR-10's images lie, for those who have them.
    """

    device_type: str
    quick: bool
    directory: Path
    cifar10: Path | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device_type != "cpu"

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_type)

    def pick(self, full: T, quick: T, rehearsal: T) -> T:
        """A size, by how much work this report is to do."""
        if not self.on_gpu:
            return rehearsal
        return quick if self.quick else full


@dataclass(frozen=True)
class Answer:
    """What a check found: a line for people, the same as plain `values` for programs.

    `passed` is None where there is nothing that may fail: a time, a share.
    """

    text: str
    values: dict[str, Any] = field(default_factory=dict)
    passed: bool | None = None


class Unanswered(Exception):
    """The question stays open here, and why: only a GPU can answer it, or a package is missing."""


ON_GPU_ONLY = "the code ran; only a GPU can answer"


@dataclass(frozen=True)
class Check:
    """A question and the function that answers it. It is given up after `limit` seconds.

    `is_correctness`: a failure means that the run would not be what Lockstep promises.
    """

    name: str
    question: str
    answer: Callable[[Setting], Answer]
    is_correctness: bool
    limit: float
