"""A run in several ways: bit for bit, in standard mode, fused and resumed, to be compared between numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.distributed.small import HASHES, largest_difference, state
from trainer import Trainer

# Makes a run that resumes, in bitwise mode: its directory, `train.stop_after`, and changes of its config.
Make = Callable[..., Trainer]


class Results(NamedTuple):
    """What a rank has of a run in each way; `resumed` only where it went on from another run."""

    bits: list[Any]
    standard: dict[str, Any]
    fused: dict[str, Any]
    resumed: list[Any] | None = None

    def assert_alike(self, of_one: Results) -> None:
        """These are the results of one process, and the run that was resumed ended as if it had not stopped."""
        assert self.bits == of_one.bits
        assert self.resumed == of_one.bits
        assert largest_difference(self.standard, of_one.standard) < 1e-12
        assert largest_difference(self.fused, of_one.standard) < 1e-12


def bits(
    make: Make, directory: Path, stop: int | None = None, **changes: Any
) -> list[Any]:
    """The digests of a run and the values of its watched metric."""
    trainer = make(directory, stop, **changes)
    summary = trainer.fit()
    return [summary[name] for name in HASHES] + trainer.progress.history


def standard(make: Make, directory: Path, **changes: Any) -> dict[str, Any]:
    """The state at the end of a run in standard mode."""
    trainer = make(directory, run__reproducibility="standard", **changes)
    trainer.fit()
    return state(trainer)


def several(
    make: Make, directory: Path, stopped: Path | None = None, **resumed: Any
) -> Results:
    """All of these ways; the last goes on with the run in `stopped`, with the changes `resumed`."""
    return Results(
        bits(make, directory / "bits"),
        standard(make, directory / "standard"),
        standard(make, directory / "fused", batch__fuse=3),
        None if stopped is None else bits(make, stopped, **resumed),
    )
