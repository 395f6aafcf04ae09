"""The means of loss and metrics that rows show: those of the steps since the last row, and those of the epoch."""

from __future__ import annotations

from trainer.core.metrics import Meter, Row, Totals
from trainer.storage.checkpoint import Progress


class RowMeans:
    """Adds up what a run's meter has measured, for a row of an interval and for that of the epoch."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._interval = Totals()
        self._epoch = Totals()

    def read_meter(self) -> None:
        """Add what was measured since the last call. A collective; waits for the device."""
        self._interval.add(self._meter.read())

    def end_interval(self) -> Row:
        """The means since the last row, as `train/loss`; the next interval begins."""
        row = _with_prefix("train/", self._interval.means())
        self._epoch.add(self._interval)
        self._interval = Totals()
        return row

    def end_epoch(self) -> Row:
        """The means of the epoch's intervals, as `train/epoch_loss`; the next epoch begins."""
        row = _with_prefix("train/epoch_", self._epoch.means())
        self._epoch = Totals()
        return row

    def save(self, progress: Progress) -> None:
        """Put the sums into what a checkpoint holds."""
        progress.interval = self._interval.sums
        progress.epoch = self._epoch.sums

    def restore(self, progress: Progress) -> None:
        """Go on with the sums that a checkpoint holds."""
        self._interval = Totals(progress.interval)
        self._epoch = Totals(progress.epoch)


def _with_prefix(prefix: str, row: Row) -> Row:
    """The row with `prefix` before the name of every column."""
    return {prefix + name: value for name, value in row.items()}
