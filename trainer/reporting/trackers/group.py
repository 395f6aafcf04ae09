"""All trackers of a run: built from the config, and told the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.config.component_lists import TrackerConfig
from trainer.config.registry import build, refuse_other_class, resolve
from trainer.config.schema import Config
from trainer.config.secrets import redacted
from trainer.errors import ConfigError
from trainer.reporting.trackers.accelerate import adapted
from trainer.reporting.trackers.base import Ending, Row, Session, Tracker
from trainer.reporting.trackers.csv_file import CsvTracker
from trainer.reporting.trackers.mlflow import MlflowTracker
from trainer.reporting.trackers.tensorboard import TensorBoardTracker
from trainer.reporting.trackers.trackio import TrackioTracker
from trainer.reporting.trackers.worker import Note, TrackerWorker
from trainer.storage.run_directory import run_path

KINDS: dict[str, type[Tracker]] = {
    "csv": CsvTracker,
    "mlflow": MlflowTracker,
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
}
DIRECTORY = "trackers"  # in the run's: what each tracker has received


def build_trackers(config: Config) -> list[Tracker]:
    """The trackers that a config names, in order, not begun yet.

    Raises `ConfigError` naming the tracker by its index, as in `trackers[0].name`; for a package that is not
    installed, with its name; and for two that would write one file.
    """
    trackers = [
        _build(f"trackers[{index}]", section, config.run.name)
        for index, section in enumerate(config.trackers)
    ]
    _check_apart(trackers, config)
    return trackers


def _check_apart(trackers: Sequence[Tracker], config: Config) -> None:
    places: dict[Path, str] = {}
    for index, tracker in enumerate(trackers):
        if not isinstance(tracker, CsvTracker | TensorBoardTracker):
            continue
        target = tracker.target(run_path(config.run))
        place = f"trackers[{index}]"
        other = places.setdefault(target.resolve(), place)
        if other != place:
            raise ConfigError(
                place,
                f"{config.trackers[index].name} would write {target}, as {other} does; name another there, or leave "
                f"one of them out",
            )


def _build(place: str, section: TrackerConfig, run_name: str) -> Tracker:
    target = resolve(place, section.name, KINDS)
    wrapped = adapted(place, target, section.args, run_name)
    if wrapped is not None:
        return wrapped
    refuse_other_class(place, section.name, target, Tracker)
    tracker = build(place, target, section.args)
    if not isinstance(tracker, Tracker):
        raise ConfigError(
            f"{place}.name",
            f"{section.name} gives a {type(tracker).__name__}, which is no trainer.Tracker",
        )
    if tracker.module:
        _import(place, section.name, tracker)
    return tracker


def _import(place: str, name: str, tracker: Tracker) -> None:
    try:
        import_module(tracker.module)
    except ImportError as error:
        raise ConfigError(
            f"{place}.name",
            f"{name} needs the package {tracker.package} ({error}); install it: pip install {tracker.package}",
        ) from None


def _state_files(labels: Sequence[str]) -> list[str]:
    """A file name for each: the first of a name keeps it where a resume adds others."""
    files: list[str] = []
    for index, label in enumerate(labels):
        number = labels[:index].count(label) + 1
        files.append(f"{label}.json" if number == 1 else f"{label}.{number}.json")
    return files


class Trackers:
    """The trackers of a run, on its main process."""

    def __init__(self, trackers: Sequence[Tracker], config: Config, note: Note) -> None:
        self._config = config
        self._workers = []
        for index, tracker in enumerate(trackers):
            section = config.trackers[index]
            key = f"trackers[{index}]"
            self._workers.append(TrackerWorker(tracker, section, key, note))

    def begin(self, directory: Path, step: int, rows: Sequence[Row]) -> list[str]:
        """Begin a session after `step`, whose earlier sessions left `rows`; returns a line for each tracker."""
        if not self._workers:
            return []
        (directory / DIRECTORY).mkdir(exist_ok=True)
        config: Mapping[str, Any] = redacted(self._config.to_dict())
        session = Session(
            name=self._config.run.name,
            directory=directory,
            config=config,
            best_metric=self._config.best.metric,
            step=step,
            rows=rows,
        )
        lines = []
        files = _state_files([worker.label for worker in self._workers])
        for worker, file in zip(self._workers, files, strict=True):
            kept_in = worker.begin(session, directory / DIRECTORY / file)
            lines.append(f"{worker.label}: {kept_in}")
        return lines

    def log(self, row: Row) -> None:
        for worker in self._workers:
            worker.log(row)

    def figures(self, step: int, figures: Mapping[str, Path]) -> None:
        for worker in self._workers:
            worker.figures(step, figures)

    def sync(self) -> None:
        for worker in self._workers:
            worker.sync()

    def finish(self, ending: Ending) -> None:
        for worker in self._workers:
            worker.finish(ending)
