"""Files that cannot be used, in a run that leaves them out: every command goes on, and says what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.programs import run_program
from trainer.data.bad_samples import BadSample, is_bad_sample
from trainer.data.batches import Loaded, Request
from trainer.data.datasets import MapDataset
from trainer.data.samples import KeyedDataset
from trainer.errors import DataError, UnreadableError
from trainer.exact.plan import Plan
from trainer.exact.remaining import remaining_step
from trainer.reporting.jsonl import read_rows
from trainer.storage import bad_samples

IMAGES = 12  # of each class and part


def make_folder(root: Path) -> None:
    """Images of two classes; in train/ one that is truncated, one that is too large and one that is empty."""
    draws = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(IMAGES):
                pixels = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:02}.png")
    first = root / "train" / "cat" / "00.png"
    first.write_bytes(first.read_bytes()[:60])
    (root / "train" / "cat" / "05.png").write_bytes(b"")
    Image.new("RGB", (400, 400)).save(root / "train" / "dog" / "03.png")
    truncated = root / "val" / "dog" / "11.png"
    truncated.write_bytes(truncated.read_bytes()[:80])


def options(root: Path, runs: Path, *more: str) -> list[str]:
    return [
        f"data.root={root}",
        f"run.dir={runs}",
        "run.name=folder",
        "data.name=folder",
        "data.max_pixels=10000",
        "data.bad_samples=quarantine",
        "batch.size=8",
        "batch.micro_size=2",
        "train.epochs=2",
        "train.log_every=1",
        "wandb.mode=disabled",
        *more,
    ]


def test_every_command_goes_on(tmp_path: Path) -> None:
    root, run = tmp_path / "images", tmp_path / "folder"
    make_folder(root)
    fit = run_program(["train.py", *options(root, tmp_path, "data.cache=0.1")])
    assert fit.returncode == 0, fit.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["bad_samples"] == 4
    assert summary["samples_seen"] == 2 * (2 * IMAGES - 3)
    assert "4 left out as bad: bad_samples.txt" in fit.stdout
    found = {(bad.part, bad.path): bad.reason for bad in bad_samples.read(run)}
    assert "more than data.max_pixels=10,000" in found["train", "train/dog/03.png"]
    assert found.keys() == {
        ("train", "train/cat/00.png"),
        ("train", "train/cat/05.png"),
        ("train", "train/dog/03.png"),
        ("val", "val/dog/11.png"),
    }
    assert fit.stdout.count("left out from step") == 4
    last = list(read_rows(run / "metrics.jsonl"))[-1]
    assert last["quarantined"] == 4

    again = run_program(["-m", "trainer", "evaluate", run])
    assert again.returncode == 0, again.stderr
    assert "left out: val sample 23 (val/dog/11.png)" in again.stdout
    step = bad_samples.read(run)[0].step
    replayed = run_program(["-m", "trainer", "replay", run, "--step", step, "--json"])
    assert replayed.returncode == 0, replayed.stderr
    result = json.loads(replayed.stdout)
    files = {sample["file"] for sample in result["samples"]}
    assert len(files) == len(result["samples"]) < 8
    assert files.isdisjoint(path for _, path in found)
    was, now = result["logged"]["train/loss"]
    assert was == pytest.approx(now, rel=1e-4)


def test_check_and_one_message_on_two_ranks(tmp_path: Path) -> None:
    root = tmp_path / "images"
    make_folder(root)
    check = run_program(["-m", "trainer", "check", *options(root, tmp_path)], ranks=2)
    assert check.returncode == 0, check.stderr
    assert "left out, up to 10 (data.max_bad)" in check.stdout
    too_many = run_program(
        ["train.py", *options(root, tmp_path, "data.max_bad=1", "data.workers=1")],
        ranks=2,
    )
    assert too_many.returncode == 2
    assert "Traceback" not in too_many.stderr
    assert too_many.stderr.count("more than data.max_bad=1") == 1
    stop = run_program(
        ["train.py", *options(root, tmp_path, "data.bad_samples=stop")], ranks=2
    )
    assert stop.returncode == 2
    assert "00.png cannot be decoded (it is cut short)" in stop.stderr


class Failing:
    """Sample `i` raises the i-th error."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = errors

    def __len__(self) -> int:
        return len(self.errors)

    def __getitem__(self, i: int) -> tuple[int, int]:
        raise self.errors[i]


def load(dataset: MapDataset) -> Loaded | DataError:
    keyed = KeyedDataset(dataset, None, seed=0, purpose="train", leaves_out=True)
    loaded = keyed[Request(0, 0, np.arange(len(dataset)))]
    assert isinstance(loaded, Loaded | DataError)
    return loaded


def test_what_the_machine_is_to_blame_for_is_no_bad_sample() -> None:
    bad = load(Failing(OSError("broken data stream"), FileNotFoundError(2, "gone")))
    assert isinstance(bad, Loaded)
    assert bad.batch is None
    assert [sample.id for sample in bad.bad] == [0, 1]
    machine: list[Exception] = [
        OSError(24, "too many open files"),
        OSError(5, "input/output error"),
        OSError(116, "stale file handle"),
        MemoryError(),
        ConnectionResetError(),
    ]
    for error in machine:
        assert isinstance(load(Failing(error)), UnreadableError)
    assert not is_bad_sample(UnreadableError("…"))


def test_remaining_step() -> None:
    plan = Plan(samples=20, batch_size=10, micro_size=2, ranks=3, epochs=1, seed=0)
    step = plan.step(1)
    ids = plan.sample_ids(step, 0, 5).tolist()
    assert remaining_step(plan, step, {*plan.sample_ids(plan.step(0), 0, 5)}) is step
    left = remaining_step(plan, step, {ids[0], ids[4], ids[5], ids[8], ids[9]})
    assert left.size == 5
    assert left.micro_batches == [(0, 1), (1, 3), (3, 5)]
    assert left.ranks == [(0, 2), (2, 3), (3, 3)]
    assert left.has_idle_rank
    kept = [plan.sample_ids(left, index).tolist() for index in range(3)]
    assert kept == [[ids[1]], ids[2:4], ids[6:8]]
    assert plan.groups(left, 0, 2) == [(0, 1), (1, 2)]
    nothing = remaining_step(plan, step, set(ids))
    assert (nothing.size, nothing.micro_batches) == (0, [])


def test_the_list_is_read_back(tmp_path: Path) -> None:
    samples = [
        BadSample("train", 3, "a b/é\t\n.png", "ValueError: one line", step=7),
        BadSample("val", 0, "", "", step=9),
    ]
    bad_samples.write(tmp_path, samples)
    with (tmp_path / bad_samples.FILE).open("a") as file:
        file.write("12\ttrain\n")  # no whole line
    read = bad_samples.read(tmp_path)
    assert read == [samples[0]._replace(path="a b/é .png"), samples[1]]
    assert bad_samples.from_rows(bad_samples.to_rows(samples)) == samples
    assert bad_samples.read(tmp_path / "other") == []
