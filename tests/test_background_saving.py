"""Checkpoints written in the background: the same files as those that training waits for, whatever comes between."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.checkpoint import measure
from tests.distributed.ranks import on_ranks
from tests.distributed.small import HASHES, Images, bitwise_config, conv_net, rows_of
from trainer import Config, Observer, Trainer
from trainer.core import saved_state
from trainer.core.profile.observer import ProfileObserver
from trainer.errors import LockstepError, Stopped
from trainer.exact.finite import first_not_finite
from trainer.exact.plan import Step
from trainer.process import signals
from trainer.storage import checkpoint, files, snapshot_writer
from trainer.storage.checkpoint import Checkpoint, Progress
from trainer.storage.snapshot_writer import SnapshotWriter

FORK = multiprocessing.get_context("fork")


def content() -> Checkpoint:
    """Of a net with tied weights, another memory format, many dtypes, an empty tensor and a state of its own."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    net = net.to(memory_format=torch.channels_last)
    net[2].weight = net[1].weight
    net.register_buffer("count", torch.tensor(3))
    net.register_buffer("brief", torch.randn(2, 3).bfloat16().t())
    net.register_buffer("empty", torch.empty(0, 2))
    weight = net[1].weight.detach()
    return Checkpoint(
        checkpoint.model_tensors(net),
        {"momentum.0.weight": torch.randn(5)},
        {},
        Progress(step=7, history=[1.0]),
        {},
        stateful={"ema": {"of": {"a": weight, "b": weight[1:]}, "n": 2}},
    )


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("room", [True, False])
def test_the_files_are_those_of_the_moment_of_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, room: bool
) -> None:
    before = content()
    expected = bytes_of(
        checkpoint.write(tmp_path / "a", checkpoint.take(before), keep=1)
    )
    notes: list[str] = []
    writer = SnapshotWriter(notes.append)
    if not room:
        monkeypatch.setattr(snapshot_writer, "share_of_main_memory", lambda: 100)
    changed = Event()

    def write(snapshot: Any) -> None:
        assert changed.wait(120) or not room
        checkpoint.write(tmp_path / "b", snapshot, keep=1)

    if not room:
        changed.set()
    for step in (7, 8):  # the second into the same memory
        before.progress.step = step
        writer.write(checkpoint.take(before), write)
        if step == 7:
            for tensor in [*before.model.values(), *before.optimizer.values()]:
                tensor.zero_()  # what the next step may do
            before.progress.history.append(2.0)
            changed.set()
            writer.wait()
            assert bytes_of(tmp_path / "b" / "step_00000007") == expected
    assert writer.close() is None
    loaded = checkpoint.load(tmp_path / "b" / "step_00000008")
    assert not any(tensor.any() for tensor in loaded.model.values())
    assert len(notes) == (0 if room else 1)


def test_an_error_is_raised_once_and_nothing_is_written_after_it(
    tmp_path: Path,
) -> None:
    written: list[int] = []

    def fail(_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    writer = SnapshotWriter(print)
    writer.write(checkpoint.take(content()), fail)
    with pytest.raises(OSError, match="No space"):
        writer.write(checkpoint.take(content()), lambda _: written.append(1))
    writer.wait()
    writer.write(checkpoint.take(content()), fail)
    assert isinstance(writer.close(), OSError)
    assert written == []


def test_values_that_are_not_finite_are_found_by_a_sum() -> None:
    large = torch.full((3,), 3e38)  # its sum overflows, and it is finite
    half = torch.full((9000,), 60000.0, dtype=torch.float16)
    fine = {"large": large, "half": half, "double": torch.ones(2).double()}
    assert first_not_finite(fine) is None
    assert first_not_finite(fine | {"bad": torch.tensor([1, torch.nan])}) == "bad"
    both = torch.tensor([torch.inf, -torch.inf])
    assert first_not_finite({"both": both} | fine) == "both"


# ---------------------------------------------------------------- whole runs


class Held(Observer):
    """Holds the checkpoint of a step back until the next one is done, and does `then`."""

    def __init__(self, number: int = 2, then: Callable[[], None] = lambda: None):
        self.goes_on = Event()
        self.has_begun = Event()
        self.number = number
        self.then = then
        self._write = checkpoint.write
        checkpoint.write = self.write

    def write(self, directory: Path, snapshot: Any, **more: Any) -> Path:
        if snapshot.step == self.number:
            self.has_begun.set()
            assert self.goes_on.wait(120), "training waits for the checkpoint"
        return self._write(directory, snapshot, **more)

    def step(self, step: Step) -> None:
        if step.number == self.number + 1:
            self.then()
            self.goes_on.set()


def train(directory: Path, name: str, *observers: Observer, **changes: Any) -> Any:
    """Two epochs of 4 steps, with a checkpoint every 2 and no evaluation in between."""
    settings = bitwise_config(
        directory,
        name,
        train__checkpoint_every=2,
        train__keep_checkpoints=9,
        **changes,
    )
    parts: dict[str, Any] = {"train_data": Images(), "val_data": Images(29)}
    trainer = Trainer(settings, model=conv_net(), observers=observers, **parts)
    return trainer.fit()


def saved(run: Path) -> dict[str, Any]:
    """The bytes of what a run keeps, without times."""
    found: dict[str, Any] = {}
    for path in sorted(run.glob("checkpoints/step_*/*")) + sorted(run.glob("best/*")):
        if path.name in ("manifest.json", "config.yaml"):
            continue
        found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
        if path.name == "state.json":
            state = json.loads(path.read_text())
            del state["progress"]["seconds"], state["config"]["run"]
            found[f"{path.parent.name}/{path.name}"] = state
    return found


def held_and_not(directory: Path) -> Any:
    """A run in which training goes on while a checkpoint is held back, and one that writes each on the spot."""
    write = checkpoint.write
    held = train(directory, "held", Held())
    checkpoint.write = write
    setattr(snapshot_writer, "share_of_main_memory", lambda: 0)  # noqa: B010
    waits = train(directory, "waits")
    return [[summary[name] for name in HASHES] for summary in (held, waits)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on_and_the_run_keeps_the_same(
    tmp_path: Path, ranks: int
) -> None:
    for held, waits in on_ranks(ranks, held_and_not, tmp_path):
        assert held == waits
    kept = saved(tmp_path / "held")
    assert kept == saved(tmp_path / "waits")
    assert len(kept) == 4 * 3 + 3
    assert rows_of(tmp_path / "held") == rows_of(tmp_path / "waits")


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def stopped(directory: Path) -> Any:
    """Stopped by a signal while the checkpoint of step 2 is held back, and gone on with."""
    held = Held(then=partial(os.kill, os.getpid(), signal.SIGTERM))
    setattr(signals, "SECONDS_BETWEEN_ANSWERS", 0.0)  # noqa: B010
    with pytest.raises(Stopped) as caught:
        train(directory, "stopped", held)
    # Several ranks agree a step later: here they ask in every step.
    step = 3 if world_size() == 1 else 4
    assert str(caught.value).startswith(f"stopped by signal 15 after step {step}")
    found = checkpoint.newest_first(directory / "stopped" / "checkpoints")
    assert [checkpoint.load(path).progress.step for path in found] == [step, 2]
    return train(directory, "stopped")


def failed(directory: Path) -> str:
    """The disk is full when the checkpoint of step 2 is written, and training is further by then."""

    def no_space(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    held = Held(then=lambda: setattr(files, "sync", no_space))
    with pytest.raises(LockstepError) as caught:
        train(directory, "failed", held)
    return str(caught.value)


def disturbed(directory: Path) -> Any:
    sync, write = files.sync, checkpoint.write
    summary = stopped(directory)
    checkpoint.write = write
    failure = failed(directory)
    files.sync, checkpoint.write = sync, write
    rest = [train(directory, "failed"), train(directory, "straight")]
    hashes = [[one[name] for name in HASHES] for one in (summary, *rest)]
    return failure, hashes


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_and_a_full_disk_while_one_is_written(
    tmp_path: Path, ranks: int
) -> None:
    for failure, hashes in on_ranks(ranks, disturbed, tmp_path):
        assert failure.startswith("cannot write ")
        assert "No space left on device" in failure
        assert hashes[0] == hashes[1] == hashes[2]


def test_a_new_best_makes_no_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made while training waits, and a run's config stays as it is."""
    texts: list[str] = []
    make = saved_state.config_yaml

    def counted(settings: Config) -> str:
        texts.append(make(settings))
        return texts[-1]

    monkeypatch.setattr(saved_state, "config_yaml", counted)
    train(tmp_path, "run")
    run = tmp_path / "run"
    metrics = json.loads((run / "best" / "metrics.json").read_text())
    assert metrics["epoch"] == 2  # the first epoch's was the best before
    assert (run / ".best.previous").is_dir()
    assert texts == [(run / "best" / "config.yaml").read_text()]


class KilledAt:
    """SIGKILL at the `operation`-th change of a file by the writer, once training is a step further."""

    def __init__(self, directory: Path, operation: int) -> None:
        self.left = operation
        held = Held(6)
        for owner, name in ((Path, "rename"), (Path, "replace"), (os, "fsync")):
            self.wrap(owner, name, held)
        train(directory, "killed", held)

    def wrap(self, owner: Any, name: str, held: Held) -> None:
        original = getattr(owner, name)

        def operate(*args: Any) -> Any:
            if held.has_begun.is_set():
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(owner, name, operate)


# The syncs of the files are 1 to 4, that of the folder 5; 6 is its rename, with a sync; 8 and 9 are those of `last`.
@pytest.mark.parametrize("operation", [1, 5, 6, 7, 9])
def test_a_kill_while_one_is_written_loses_nothing_that_was_complete(
    tmp_path: Path, operation: int
) -> None:
    process = FORK.Process(target=KilledAt, args=(tmp_path, operation))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    found = checkpoint.newest_first(tmp_path / "killed" / "checkpoints")
    assert [checkpoint.load(path).progress.step for path in found] == (
        [4, 2] if operation <= 6 else [4, 2, 6]
    )

    def go_on() -> Any:
        return [train(tmp_path, "killed"), train(tmp_path, "straight")]

    ((resumed, straight),) = on_ranks(1, go_on)
    assert [resumed[name] for name in HASHES] == [straight[name] for name in HASHES]
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "straight")


def test_the_benchmark_measures_each_way_of_saving() -> None:
    (text,) = on_ranks(1, measure, rounds=1, threads=1, layers=1)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[0][2:] for row in rows] == [
        "`Trainer.save`",
        "`torch.save`",
        "`torch.save`, waiting for the disk",
        "`torch.load`",
    ]
    assert text.startswith("A checkpoint of 13 MB; ")


class FailingAt(Observer):
    def __init__(self, step: int) -> None:
        self.last = step

    def step(self, step: Step) -> None:
        if step.number == self.last:
            raise LockstepError("as told")


def test_a_failure_at_the_profiles_end_does_not_cut_a_checkpoint_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, close = checkpoint.write, SnapshotWriter.close
    is_closing = Event()

    def write_late(*arguments: Any, **options: Any) -> Path:
        is_closing.wait(30)
        return write(*arguments, **options)

    def close_writer(writer: SnapshotWriter) -> Any:
        is_closing.set()
        return close(writer)

    def fail(_: ProfileObserver) -> None:
        raise RuntimeError("no trace")

    monkeypatch.setattr(checkpoint, "write", write_late)
    monkeypatch.setattr(SnapshotWriter, "close", close_writer)
    monkeypatch.setattr(ProfileObserver, "end_session", fail)
    settings = bitwise_config(
        tmp_path,
        "run",
        batch__size=4,
        batch__micro_size=4,
        train__checkpoint_every=20,
        train__profile=1,
        train__epochs=1,
    )
    trainer = Trainer(
        settings, model=conv_net(), train_data=Images(), observers=[FailingAt(21)]
    )
    with pytest.raises(RuntimeError, match="no trace") as caught:
        trainer.fit()
    assert str(caught.value.__context__) == "as told"
    is_written = (tmp_path / "run" / "checkpoints" / "step_00000020").is_dir()
    is_closing.set()  # the thread ends where nothing else lets it
    assert is_written
