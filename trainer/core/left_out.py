"""What a run leaves out, in its files: `bad_samples.txt`, checkpoints and rows. Nothing where it leaves out nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from trainer.core.metrics import Row
from trainer.core.run import Run
from trainer.data.bad_samples import BadSample, Quarantine
from trainer.storage import bad_samples
from trainer.storage.checkpoint import Progress

Keep = Callable[[Quarantine, Sequence[BadSample]], None]


class LeftOut:
    """The record of a run's quarantine."""

    def __init__(self, run: Run) -> None:
        self._ranks = run.ranks
        self._quarantine = run.quarantine
        self._closing_step: int | None = None  # see `restore`

    def count(self, *, is_evaluated: bool = False) -> Row:
        """The column of a row: how many samples are left out so far, before or after the step's evaluation."""
        if self._quarantine is None:
            return {}
        # A resumed run knows those that an earlier session found later, too.
        step = self._quarantine.step
        found = 0
        for bad in self._quarantine.samples:
            last = step if bad.part == "train" or is_evaluated else step - 1
            found += bad.step <= last
        return {"quarantined": found}

    def list_in(self, directory: Path, keep: Keep) -> None:
        """Have those that are known, and those that are found, listed in `directory`, by `keep`. A collective."""
        if self._quarantine is None:
            return
        self._quarantine.file = str(directory / bad_samples.FILE)
        self._quarantine.keep = partial(keep, self._quarantine)
        if len(self._quarantine):
            self._quarantine.keep([])

    def save(self, progress: Progress) -> None:
        """Put them into what a checkpoint holds."""
        if self._quarantine is not None:
            progress.bad_samples = bad_samples.to_rows(self._quarantine.samples)

    def restore(self, progress: Progress) -> None:
        """Leave out what a checkpoint holds, from the same steps on."""
        if self._quarantine is not None:
            self._quarantine.step = progress.step
            self._quarantine.take_over(bad_samples.from_rows(progress.bad_samples))
            # What the end of a session finds, it finds after its checkpoint, and the run as a whole does not end there.
            is_due = progress.epoch_end_is_due or progress.evaluation_is_due
            self._closing_step = None if is_due else progress.step

    def take_over(self, directory: Path) -> None:
        """Leave out what the run in `directory` found after its checkpoint. A collective; rank 0 reads."""
        if self._quarantine is not None:
            listed = self._ranks.on_main(lambda: bad_samples.read(directory))
            self._quarantine.take_over(
                bad for bad in listed if bad.step != self._closing_step
            )
