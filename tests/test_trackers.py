"""Trackers beside W&B: what each wrote, read back by the library that it is for."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config, fitted, mlp
from trainer import Config, ConfigError, LockstepError, Tracker, Trainer
from trainer.config.load import help_text, load
from trainer.reporting.jsonl import read_rows
from trainer.reporting.trackers.group import Trackers, build_trackers

SECRET = "hunter2hunter2"
HERE = "tests.test_trackers"


def settings(directory: Path, trackers: list[dict[str, Any]], **changes: Any) -> Config:
    changes = {"batch__micro_size": 7, **changes}
    tree = config(directory, **changes).to_dict()
    return Config.from_dict({**tree, "trackers": trackers})


def fit(
    directory: Path, trackers: list[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    """A run of two epochs of four steps."""
    trainer = Trainer(
        settings(directory, trackers, **changes),
        model=mlp(),
        train_data=Points(ignored=False),
        val_data=Points(ignored=False),
    )
    return trainer.fit()


def stop_inside_a_step(directory: Path, trackers: list[dict[str, Any]]) -> None:
    """A checkpoint at step 4, between the row of its interval and that of its epoch, and rows after it."""

    class Failing(Trainer):
        def train_step(self, step: Any) -> None:
            if step.number == 7:
                raise LockstepError("out of luck")
            super().train_step(step)

    data = Points(ignored=False)
    with pytest.raises(LockstepError, match="out of luck"):
        Failing(
            settings(directory, trackers), model=mlp(), train_data=data, val_data=data
        ).fit()


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return read_rows(directory / "run" / "metrics.jsonl")


def numbers_by_name(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every number, by name."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "digest"):
                points.setdefault(name, []).append((row["step"], value))
    return points


def tensorboard_scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory)).Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        scalars[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return scalars


def read_csv(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            cells = {name: cell for name, cell in row.items() if cell}
            rows.append(
                {
                    name: cell if name == "digest" else json.loads(cell)
                    for name, cell in cells.items()
                }
            )
    return rows


def assert_same_points(
    points: Mapping[str, list[tuple[int, float]]], rows: list[dict[str, Any]]
) -> None:
    """Each row once, in fp32, which is what TensorBoard keeps."""
    expected = numbers_by_name(rows)
    assert points.keys() == expected.keys()
    for name, values in expected.items():
        assert [step for step, _ in points[name]] == [step for step, _ in values]
        for (_, value), (_, wanted) in zip(points[name], values, strict=True):
            assert value == pytest.approx(wanted, rel=1e-6), name


BOTH = [{"name": "tensorboard"}, {"name": "csv"}, {"name": f"{HERE}.Own"}]


class Own(Tracker):
    """One of a user's own: appends rows to a file, and cannot take any back."""

    def __init__(
        self,
        broken_at: int | None = None,
        delay: float = 0.0,
        api_key: str = "",
        server: str = "",
    ) -> None:
        self.broken_at = broken_at
        self.api_key = api_key
        self.delay = delay

    def begin(self, session: Any) -> None:
        self.id = session.id or "first"
        self.path = session.directory / "own.jsonl"

    def describe(self) -> str:
        return f"file {self.path.name}"

    def log(self, row: Mapping[str, Any]) -> None:
        time.sleep(self.delay)
        if row["step"] == self.broken_at:
            raise RuntimeError(f"no room {self.api_key}")
        with self.path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")


def test_rows_config_figures_and_summary(tmp_path: Path) -> None:
    """Also on two processes: rank 0 alone writes, and the table is the same but for times."""

    def run(name: str) -> None:
        fit(tmp_path / name, BOTH, run__figures=name == "one")

    on_ranks(1, run, "one")
    on_ranks(2, run, "two")
    for name in ("one", "two"):
        run_directory = tmp_path / name / "run"
        rows = rows_of(tmp_path / name)
        assert len(rows) == 10
        assert read_csv(run_directory / "metrics.csv") == rows
        assert read_rows(run_directory / "own.jsonl") == rows
        assert_same_points(tensorboard_scalars(run_directory / "tensorboard"), rows)
    timed = {"samples_per_second", "data_wait", "digest"}
    first, second = (rows_of(tmp_path / name) for name in ("one", "two"))
    for row, other in zip(first, second, strict=True):
        assert row.keys() == other.keys()
        for column in row.keys() - timed:
            assert row[column] == pytest.approx(other[column], rel=1e-10)

    events = EventAccumulator(str(tmp_path / "one" / "run" / "tensorboard")).Reload()
    assert "figures/curves" in events.Tags()["images"]
    summary = json.loads((tmp_path / "one" / "run" / "summary.json").read_text())
    (text,) = events.Tensors("summary/text_summary")
    assert summary["weights_sha256"] in text.tensor_proto.string_val[0].decode()
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert b"optimizer.momentum" in plugin.content


def resumed(directory: Path, trackers: list[dict[str, Any]]) -> None:
    fit(directory, trackers, run__resume="auto")


def test_a_resume_doubles_no_row_and_loses_none(tmp_path: Path) -> None:
    """The checkpoint lies between two rows of one step. TensorBoard's rows, CSV's, and those of an append-only one."""
    late = [*BOTH, {"name": "tensorboard", "log_dir": str(tmp_path / "late")}]
    on_ranks(1, stop_inside_a_step, tmp_path, BOTH)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 4, 5, 6]
    on_ranks(2, resumed, tmp_path, late)
    rows = rows_of(tmp_path)
    run_directory = tmp_path / "run"
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert read_csv(run_directory / "metrics.csv") == rows
    assert_same_points(tensorboard_scalars(run_directory / "tensorboard"), rows)
    # One that a resume adds gets the earlier rows, too.
    assert_same_points(tensorboard_scalars(tmp_path / "late"), rows)
    own = read_rows(run_directory / "own.jsonl")
    assert [(row["step"], sorted(row)) for row in own] == [
        (row["step"], sorted(row)) for row in rows
    ]


def output_of(function: Callable[[], Any], capfd: Any) -> str:
    on_ranks(1, function)
    return str(capfd.readouterr().out)


def test_a_tracker_that_fails_is_one_warning(tmp_path: Path, capfd: Any) -> None:
    """It fails, or it hangs; the run goes on, and after a resume it gets what it lacks."""
    failing = {"name": f"{HERE}.Own", "broken_at": 3, "api_key": SECRET}

    def run() -> None:
        fit(tmp_path / "a", [failing, {"name": "csv"}])
        slow = {"name": f"{HERE}.Own", "delay": 300, "timeout": 0.2}
        start = time.monotonic()
        fit(tmp_path / "b", [slow])
        assert time.monotonic() - start < 100

    text = output_of(run, capfd)
    assert text.count(f"tracker {HERE}.Own failed (no room <redacted>") == 1
    assert text.count("no answer within 0.2 s, trackers[0].timeout") == 1
    assert f"{HERE}.Own: file own.jsonl" in text
    assert len(read_csv(tmp_path / "a" / "run" / "metrics.csv")) == 10
    assert len(read_rows(tmp_path / "a" / "run" / "own.jsonl")) == 2

    def strict() -> None:
        with pytest.raises(LockstepError, match=r"no room.*\(trackers\[0\]\.strict\)"):
            fit(tmp_path / "c", [{**failing, "strict": True}])

    on_ranks(2, strict)

    def again() -> None:
        mended = [{"name": "csv"}, {"name": f"{HERE}.Own"}]
        fit(tmp_path / "a", mended, run__resume="auto", train__epochs=3)

    on_ranks(1, again)
    own = read_rows(tmp_path / "a" / "run" / "own.jsonl")
    assert own == rows_of(tmp_path / "a")


def test_secrets_stay_out(tmp_path: Path) -> None:
    tree = config(tmp_path).to_dict()
    tree["data"] = {"name": "digits", "api_key": SECRET}
    login = f"https://me:{SECRET}@example.org"
    own = {"name": f"{HERE}.Own", "api_key": SECRET, "server": login}
    tree["trackers"] = [{"name": "tensorboard"}, own]
    made = Config.from_dict(tree)
    trackers = Trackers(build_trackers(made), made, print)
    trackers.begin(tmp_path, 0, [])
    for file in (tmp_path / "tensorboard").iterdir():
        content = file.read_bytes()
        assert SECRET.encode() not in content
        assert b"<redacted>" in content


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("[{name: tensorbord}]", 'trackers[0].name: "tensorbord" is not one of tensor'),
        ("[{name: csv},{strict: 1}]", "trackers[1].strict: 1 is not a boolean"),
        (
            "{name: csv}",
            "trackers: {name: csv} is not a list such as [{name: my_package.MyTr",
        ),
    ],
)
def test_mistakes_in_the_config(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [f"trackers={override}"])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ({"name": "csv", "fil": "a"}, 'trackers[0].fil: CsvTracker has no such argument; did you mean "file"'),
        # The run's own file, which every row is read from after a stop.
        ({"name": "csv", "file": "metrics.jsonl"}, "trackers[0]: CsvTracker refused its arguments"),
        ({"name": "builtins.dict"}, "trackers[0].name: "),
        ({"name": f"{HERE}.Missing"}, f"trackers[0].name: {HERE}.Missing needs the package no-such-thing"),
    ],
)  # fmt: skip
def test_mistakes_that_are_found_before_training(
    tracker: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_trackers(Config.from_dict({"trackers": [tracker]}))
    assert str(caught.value).startswith(message)


class Missing(Tracker):
    module = "no_such_module"
    package = "no-such-thing"


def test_help_names_them() -> None:
    assert "trackers=[]" in help_text()
    assert "timeout=30.0  (number)" in help_text()


def test_accelerates_trackers(tmp_path: Path) -> None:
    def run() -> None:
        name = "accelerate.tracking.TensorBoardTracker"
        fit(tmp_path, [{"name": name, "logging_dir": str(tmp_path / "events")}])

    on_ranks(1, run)
    rows = rows_of(tmp_path)
    assert_same_points(tensorboard_scalars(tmp_path / "events" / "run"), rows)


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the small package has it
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    uri = f"file:{tmp_path / 'mlruns'}"
    trackers = [{"name": "mlflow", "tracking_uri": uri, "tags": {"a": "b"}}]
    on_ranks(1, stop_inside_a_step, tmp_path, trackers)
    on_ranks(1, resumed, tmp_path, trackers)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs(
        [client.get_experiment_by_name("lockstep").experiment_id]
    )
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.momentum"] == "0.9"
    assert run.data.tags["a"] == "b"
    expected = numbers_by_name(rows_of(tmp_path))
    for name, points in expected.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in history] == [step for step, _ in points]
        if name not in ("samples_per_second", "data_wait"):
            assert [metric.value for metric in history] == [v for _, v in points]
    artifacts = [item.path for item in client.list_artifacts(run.info.run_id)]
    assert {"config.yaml", "summary.json"} <= set(artifacts)


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not imported here: trackio reads the variable once, and each process below imports it anew.
    if find_spec("trackio") is None:
        pytest.skip("needs trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackers = [{"name": "trackio", "project": "small"}]
    on_ranks(1, stop_inside_a_step, tmp_path, trackers)
    on_ranks(1, resumed, tmp_path, trackers)

    def read() -> list[dict[str, Any]]:
        from trackio.sqlite_storage import SQLiteStorage

        logs: list[dict[str, Any]] = SQLiteStorage.get_logs("small", "run")
        return logs

    (logs,) = on_ranks(1, read)
    assert (tmp_path / "trackio" / "small.db").exists()
    rows = rows_of(tmp_path)
    logged = [entry for entry in logs if "epoch" in entry]
    assert [entry["step"] for entry in logged] == [row["step"] for row in rows]
    assert [entry.get("train/loss") for entry in logged] == [
        row.get("train/loss") for row in rows
    ]


def test_a_run_without_trackers_imports_none(tmp_path: Path) -> None:
    def run() -> list[str]:
        before = set(sys.modules)
        fitted(config(tmp_path), mlp(), train_data=Points(ignored=False))
        return [name for name in set(sys.modules) - before if "tracking" in name]

    assert on_ranks(1, run) == [[]]
    assert not (tmp_path / "run" / "trackers").exists()


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (
            [{}, {"file": "metrics.csv"}],
            "trackers[1]: csv would write {run}/metrics.csv",
        ),
        (
            [{"file": "{run}/a.csv"}, {"file": "./a.csv"}],
            "trackers[1]: csv would write",
        ),
        ([{"file": "a.csv"}, {"file": "b.csv"}], ""),
        ([{"name": "tensorboard"}] * 2, "trackers[1]: tensorboard would write"),
        ([{"name": "tensorboard"}, {"name": "tensorboard", "log_dir": "x"}], ""),
        (
            [{"name": "tensorboard", "log_dir": " "}],
            "trackers[0]: TensorBoardTracker refused",
        ),
        (
            [{"name": "mlflow", "tracking_uri": ""}],
            "trackers[0]: MlflowTracker refused",
        ),
        ([{"file": ""}], "trackers[0]: CsvTracker refused"),
    ],
)
def test_two_that_write_one_file_and_empty_paths(
    trackers: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tree = {
        "run": {"dir": str(tmp_path), "name": "run"},
        "trackers": [{"name": "csv"} | tracker for tracker in trackers],
    }
    for tracker in tree["trackers"]:
        if "file" in tracker:
            tracker["file"] = tracker["file"].format(run=run)
    made = Config.from_dict(tree)
    if not message:
        assert len(build_trackers(made)) == 2
        return
    with pytest.raises(ConfigError) as caught:
        build_trackers(made)
    assert str(caught.value).startswith(message.format(run=run))
