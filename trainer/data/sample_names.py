"""What messages call the samples of a data set, and how they tell of other people's errors."""

from __future__ import annotations

import re
import traceback

from trainer.data.bad_samples import BadSample
from trainer.data.datasets import MapDataset
from trainer.data.names import printable
from trainer.errors import DataError


class SampleNames:
    """Names such as `train sample 7 (cats/7.png)`: the samples' label, the number, and the path if there is one."""

    def __init__(self, dataset: MapDataset, label: str) -> None:
        self._dataset = dataset
        self._label = label

    def __call__(self, sample_id: int) -> str:
        name = f"{self._label} sample {sample_id}"
        path = self._path(sample_id)
        return f"{name} ({path})" if path else name

    def describe_bad(self, sample_id: int, error: DataError) -> BadSample:
        """The sample with the reason for which it is left out, in one line."""
        reason = " ".join(str(error).split())
        # Without the name, which stands beside it, and without addresses in memory, which differ between processes.
        reason = reason.removeprefix(f"{self(sample_id)}: ")
        reason = re.sub(r" at 0x[0-9a-f]+", "", reason)
        return BadSample(self._label, sample_id, self._path(sample_id), reason)

    def _path(self, sample_id: int) -> str:
        paths = getattr(self._dataset, "paths", None)
        if paths is None:
            return ""
        return printable(str(paths[sample_id]))


def describe_failure(error: BaseException) -> str:
    """An error of other people's code: its kind, its text, and the line that raised it.

    As text, for the traceback itself may not travel between processes.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
