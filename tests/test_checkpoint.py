"""Checkpoints: complete or absent, verified when read."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trainer.config.run_sections import RunConfig
from trainer.config.schema import Config
from trainer.errors import ConfigError, LockstepError
from trainer.storage import best_model, checkpoint, files
from trainer.storage.checkpoint import Checkpoint, Progress
from trainer.storage.host_copies import host_copies
from trainer.storage.run_directory import RunDirectory, check_same_run
from trainer.storage.sha256 import file_sha256, tensors_sha256


def checkpoint_of(step: int) -> Checkpoint:
    progress = Progress(
        step=step,
        samples_seen=64 * step,
        best=0.5,
        history=[0.1, float("nan")],
        epoch={"loss": ([1 / 3, 1e-20], [7.0])},
    )
    return Checkpoint(
        {"w": torch.full((3,), float(step))},
        {"momentum.w": torch.ones(3)},
        {"a.w": 1.5},
        progress,
        {"run": {"seed": 1}},
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, checkpoint.take(checkpoint_of(7)), keep=2)
    assert path.name == "step_00000007"
    assert (tmp_path / "last").read_text().strip() == path.name
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["files"] == {
        f.name: file_sha256(f) for f in path.iterdir() if f.name != "manifest.json"
    }
    loaded = checkpoint.load(path)
    expected = checkpoint_of(7)
    assert torch.equal(loaded.model["w"], expected.model["w"])
    assert torch.equal(loaded.optimizer["momentum.w"], expected.optimizer["momentum.w"])
    assert loaded.optimizer_numbers == expected.optimizer_numbers
    assert repr(loaded.progress.history) == repr(expected.progress.history)
    assert tuple(loaded.progress.epoch["loss"]) == expected.progress.epoch["loss"]
    assert loaded.config == expected.config


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        checkpoint.write(tmp_path, checkpoint.take(checkpoint_of(step)), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "last",
        "step_00000015",
        "step_00000020",
    ]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000020"
    shutil.rmtree(tmp_path / "step_00000020")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000015"
    assert checkpoint.latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed_and_named(tmp_path: Path, name: str, damage: str) -> None:
    path = checkpoint.write(tmp_path, checkpoint.take(checkpoint_of(7)), keep=2)
    content = (path / name).read_bytes()
    if damage == "flip":
        (path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        (path / name).write_bytes(content[: len(content) // 2])
    else:
        (path / name).unlink()
    with pytest.raises(LockstepError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)


def test_a_resume_tries_the_newest_first(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        checkpoint.write(tmp_path, checkpoint.take(checkpoint_of(step)), keep=9)
    (tmp_path / "last").write_text("step_00000015\n")
    paths = checkpoint.newest_first(tmp_path)
    assert [path.name[-2:] for path in paths] == ["15", "10", "05", "20"]
    (tmp_path / "last").write_text("nonsense")
    paths = checkpoint.newest_first(tmp_path)
    assert [path.name[-2:] for path in paths] == ["20", "15", "10", "05"]


def test_damaged_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.write(tmp_path, checkpoint.take(checkpoint_of(step)), keep=9)
    for step in (10, 15):
        (tmp_path / f"step_000000{step}" / "state.json").unlink()
    content, notes = checkpoint.load_newest(checkpoint.newest_first(tmp_path))
    assert content.progress.step == 5
    assert ["_00000015:" in notes[0] or "_00000015/" in notes[0], len(notes)] == [
        True,
        2,
    ]
    assert notes[1].endswith("set aside as damaged_step_00000010")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000005"
    # Nothing is renamed where nothing can be read: another version of the program may read them.
    (tmp_path / "step_00000005" / "state.json").unlink()
    with pytest.raises(LockstepError, match=r"no checkpoint can be read: .*never"):
        checkpoint.load_newest(checkpoint.newest_first(tmp_path))
    assert (tmp_path / "step_00000005").exists()


def test_a_replaced_directory_is_deleted_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever rename fails, as where the process is killed, one of the two is complete."""
    rename = Path.rename
    for name in (".partial.step_00000005", "step_00000005"):
        checkpoint.write(tmp_path, checkpoint.take(checkpoint_of(5)), keep=1)

        def fail(self: Path, target: Path, name: str = name) -> Path:
            if self.name == name:
                raise KeyboardInterrupt
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fail)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.write(tmp_path, checkpoint.take(checkpoint_of(5)), keep=1)
        content, _ = checkpoint.load_newest(checkpoint.newest_first(tmp_path))
        assert content.progress.step == 5


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at any of a checkpoint's syncs: the one before stays the last, and nothing half-written."""
    checkpoint.write(tmp_path, checkpoint.take(checkpoint_of(5)), keep=1)
    sync = files.sync
    syncs_until_full = 0

    def sync_or_fail(path: Path) -> None:
        nonlocal syncs_until_full
        syncs_until_full -= 1
        if syncs_until_full == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        sync(path)

    monkeypatch.setattr(files, "sync", sync_or_fail)
    for syncs_until_full in range(1, 6):  # noqa: B007 - read by `sync_or_fail`
        with pytest.raises(OSError, match="No space left"):
            checkpoint.write(tmp_path, checkpoint.take(checkpoint_of(6)), keep=1)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step_00000005"]
        assert checkpoint.load(tmp_path / "step_00000005").progress.step == 5


def save_best(run: Path, step: int, **more: Any) -> None:
    snapshot = best_model.take(
        {"w": torch.tensor([float(step)])},
        "run: {}\n",
        {"step": step, "val/loss": 1 / step},
        {},
        private=False,
    )
    best_model.write(run, snapshot, **more)


def test_best_is_replaced_whole_and_goes_back_with_the_run(tmp_path: Path) -> None:
    save_best(tmp_path, 10)
    save_best(tmp_path, 20)
    names = [
        "config.yaml",
        "manifest.json",
        "metrics.json",
        "model.safetensors",
        "signature.json",
    ]
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == names
    assert load_file(tmp_path / "best" / "model.safetensors")["w"].item() == 20
    best_model.restore(tmp_path, 20)
    assert best_model.load(tmp_path)[1]["step"] == 20
    best_model.restore(tmp_path, 10)  # the run goes on from before step 20
    tensors, row = best_model.load(tmp_path)
    assert (tensors["w"].item(), row["step"]) == (10, 10)
    # Cut off between the two renames.
    (tmp_path / "best").rename(tmp_path / ".best.previous")
    assert best_model.load(tmp_path)[1]["step"] == 10
    with pytest.raises(LockstepError, match="has no best model yet"):
        best_model.load(tmp_path / "elsewhere")


def test_the_best_model_of_the_newest_checkpoint_stays(tmp_path: Path) -> None:
    """However many better ones follow it before the next checkpoint."""
    for step in (10, 20, 30, 40):
        save_best(tmp_path, step, saved_best_step=10)
    assert best_model.load(tmp_path)[1]["step"] == 40
    best_model.restore(tmp_path, 10)
    assert best_model.load(tmp_path)[1]["step"] == 10


def test_a_flipped_bit_of_the_best_model_is_noticed(tmp_path: Path) -> None:
    save_best(tmp_path, 10)
    file = tmp_path / "best" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(LockstepError, match="is not what was written"):
        best_model.load(tmp_path)
    # A run of an earlier version has no manifest.
    (tmp_path / "best" / "manifest.json").unlink()
    assert best_model.load(tmp_path)[1]["step"] == 10


def test_snapshots_are_copies_tied_weights_included() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    snapshot = host_copies(checkpoint.model_tensors(model))
    with torch.no_grad():
        model[0].weight.zero_()
    assert snapshot["0.weight"].abs().sum() > 0
    assert snapshot["0.weight"].data_ptr() != snapshot["1.weight"].data_ptr()


def test_digests_follow_names_values_and_dtypes() -> None:
    a, b = torch.arange(4.0), torch.tensor(7)
    assert tensors_sha256({"a": a, "b": b}) == tensors_sha256({"b": b, "a": a.clone()})
    others = [{"a": a, "c": b}, {"a": a + 1e-6, "b": b}, {"a": a.double(), "b": b}]
    assert len({tensors_sha256(t) for t in [{"a": a, "b": b}, *others]}) == 4
    assert tensors_sha256({"t": a.view(2, 2).t()}) == tensors_sha256(
        {"t": torch.tensor([[0.0, 2], [1, 3]])}
    )


def test_an_earlier_run_is_moved_aside_never_overwritten(tmp_path: Path) -> None:
    section = RunConfig(name="r", dir=str(tmp_path))
    for number in range(3):
        run = RunDirectory(section)
        (run.path / "metrics.jsonl").write_text(str(number))
        run.close()
    assert {p.name: (p / "metrics.jsonl").read_text() for p in tmp_path.iterdir()} == {
        "r": "2",
        "r.1": "0",
        "r.2": "1",
    }


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    section = RunConfig(name="r", dir=str(tmp_path))
    run = RunDirectory(section)
    (run.path / "metrics.jsonl").write_text("x")
    with pytest.raises(ConfigError, match=r"run\.name: another process is training in"):
        RunDirectory(section)
    assert (run.path / "metrics.jsonl").read_text() == "x"
    run.close()
    RunDirectory(section).close()


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_a_runs_name_is_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        RunDirectory(RunConfig(name=name, dir=str(tmp_path)))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"run\.dir: .*file/a cannot be made \(Not a directory\)"
    ):
        RunDirectory(RunConfig(name="a", dir=str(tmp_path / "file")))


def test_what_may_change_between_sessions() -> None:
    before = Config().to_dict()
    free = {
        "data": {"workers": 3},
        "train": {"epochs": 99, "max_steps": 5, "log_every": 1},
        "wandb": {"project": "other"},
    }
    check_same_run(before, Config.from_dict(free), RunConfig())
    for section, key, value in (
        ("optimizer", "lr", 0.2),
        ("optimizer", "momentum", 0.9),
        ("batch", "micro_size", 3),
    ):
        changed = Config.from_dict({section: {key: value}})
        with pytest.raises(ConfigError) as caught:
            check_same_run(before, changed, RunConfig())
        assert caught.value.key == f"{section}.{key}"
        check_same_run(before, changed, RunConfig(resume_changes="allow"))
    changed = Config.from_dict({"optimizer": {"name": "adamw"}})
    with pytest.raises(
        ConfigError, match=r"optimizer\.name: adamw cannot go on from the state of sgd"
    ):
        check_same_run(before, changed, RunConfig(resume_changes="allow"))


def test_a_key_that_an_earlier_version_did_not_know_has_its_default() -> None:
    before = Config().to_dict()
    del before["optimizer"]["layer_decay"], before["batch_norm"]
    check_same_run(before, Config(), RunConfig())
    changed = Config.from_dict({"optimizer": {"layer_decay": 0.5}})
    with pytest.raises(
        ConfigError, match=r"optimizer\.layer_decay was 1\.0 and is 0\.5"
    ):
        check_same_run(before, changed, RunConfig())


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"model: is not the checkpoint's: .*size mismatch for weight"
    ):
        checkpoint.restore_model(nn.Linear(3, 2), nn.Linear(4, 2).state_dict())


@pytest.mark.parametrize("damaged", [b"", b"\xff\xfe", b".", b"step_00000009"])
def test_a_damaged_pointer_is_passed_over(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "step_00000003").mkdir()
    (tmp_path / "last").write_bytes(damaged)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000003"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = checkpoint.write(tmp_path, checkpoint.take(checkpoint_of(7)), keep=2)
        save_best(tmp_path, 10)
    finally:
        os.umask(before)
    files_written = [*path.iterdir(), *(tmp_path / "best").iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files_written} == {0o666 & ~umask}
