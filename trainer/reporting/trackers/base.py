"""What a tracker is: a class that is given a run's rows, figures and end, on the main process only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from trainer.config.fields import show

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Session:
    """What a tracker begins with.

    Attributes: `name` and `directory`, the run's; `config`, nested mappings, redacted; `best_metric`, the metric that
    decides which model is best; `step`, after which training goes on, 0 for a new run; `rows`, those of earlier
    sessions that still count; `missing`, those among them that this tracker was never given; `id`, what the tracker's
    own `id` was in the earlier session.
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    best_metric: str
    step: int = 0
    rows: Sequence[Row] = ()
    missing: Sequence[Row] = ()
    id: str | None = None


class Ending(NamedTuple):
    """How a session ended: `summary` is the contents of `summary.json`, empty unless it `finished`.

    `reason` says why it did not, without secrets.
    """

    status: Literal["finished", "stopped", "failed"]
    summary: Mapping[str, Any]
    reason: str


class Tracker:
    """Keeps a run's rows somewhere. Override what you need; each method does nothing by itself.

    All methods but the constructor are called in a thread of the tracker's own, so they may take time: training does
    not wait for them, except at checkpoints and at the end, for `timeout` seconds at most. An error in any of them
    ends the tracker, not the run.
    """

    # Imported before the run begins; where that fails, one message says which package to install.
    module: ClassVar[str] = ""
    package: ClassVar[str] = ""
    # True for one that, after `begin`, has `Session.rows` and no others. Any other gets the missing rows by `log`, and
    # no row twice.
    cuts: ClassVar[bool] = False

    id: str | None = None  # a resumed run gets it back, in `Session.id`

    def begin(self, session: Session) -> None:
        """Before the first row of a session."""

    def describe(self) -> str:
        """Where the rows are, for the header."""
        return ""

    def log(self, row: Row) -> None:
        """A row as in metrics.jsonl: numbers, and the text `digest`, by name; `step` and `epoch` among them."""

    def figures(self, step: int, figures: Mapping[str, Path]) -> None:
        """PNG files, and tables as CSV files, by name."""

    def finish(self, ending: Ending) -> None:
        """After the last row and figure of a session."""


def read_pixels(path: Path) -> npt.NDArray[np.uint8]:
    """The figure in a PNG file, `(H, W, 3)`."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def numbers_in(row: Row) -> dict[str, float]:
    """The numbers of a row but its step."""
    numbers = {}
    for name, value in row.items():
        if name != "step" and isinstance(value, int | float):
            numbers[name] = value
    return numbers


def flat_config(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A config as hyperparameters: values by dotted key, null and lists as YAML writes them."""
    return dict(_flatten(config, ""))


def _flatten(
    tree: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, bool | int | float | str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", show(value)
