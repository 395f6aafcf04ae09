"""Machines without a shared disk: rank 0 alone reads and writes the run's directory, and every rank goes on from it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    Images,
    config,
    conv_net,
    fitted,
    largest_difference,
    state,
)
from tests.programs import Program, run_program
from trainer import Config, LockstepError, Trainer
from trainer.process.ranks import Ranks
from trainer.reporting.figures import drawing
from trainer.storage import best_model, checkpoint


class Count:
    """Stateful: a tensor, a tuple and a number, which all ranks count alike."""

    def __init__(self) -> None:
        self.total = torch.zeros(3, dtype=torch.float64)
        self.steps = 0

    def step(self, *_: Any) -> None:
        self.steps += 1
        self.total += self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "pair": (self.steps, "a"), 5: self.steps}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        assert saved["pair"] == (saved[5], "a")
        self.total, self.steps = saved["total"].clone(), saved[5]


def own_directory(directory: Path) -> Path:
    """Each rank's own, as on a machine of its own."""
    return directory / os.environ.get("RANK", "0")


def settings(directory: Path, **changes: Any) -> Config:
    return config(
        directory,
        batch__micro_size=7,
        run__resume="auto",
        train__checkpoint_every=2,
        **changes,
    )


def net() -> nn.Module:
    model = conv_net()
    model.insert(4, nn.Dropout(0.3))
    return model


def train(
    directory: Path, is_shared: bool, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """The weights at the end, the best ones, and the state that travelled."""
    own = directory if is_shared else own_directory(directory)
    counts = Count()
    trainer = Trainer(
        settings(own, **changes),
        model=net(),
        train_data=Images(103),
        val_data=Images(50),
        stateful={"counts": counts},
    )
    step = trainer.train_step

    def counted(of: Any) -> None:
        step(of)
        counts.step()

    trainer.train_step = counted  # type: ignore[method-assign]
    trainer.fit()
    last = state(trainer)
    trainer.load_best()
    return last, state(trainer), counts.state_dict()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_ranks(1, train, tmp_path_factory.mktemp("reference"), True)[0]


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_run_and_its_resume_need_no_shared_directory(
    tmp_path: Path, reference: Any, channels_last: bool
) -> None:
    on_ranks(
        2,
        train,
        tmp_path,
        False,
        train__max_steps=5,
        train__channels_last=channels_last,
    )
    for last, best, counts in on_ranks(
        2, train, tmp_path, False, train__channels_last=channels_last
    ):
        assert largest_difference(last, reference[0]) < 1e-12
        assert largest_difference(best, reference[1]) < 1e-12
        assert torch.equal(counts["total"], reference[2]["total"])
    run = tmp_path / "0" / "run"
    assert json.loads((run / "summary.json").read_text())["steps"] == 8
    assert not (tmp_path / "1").exists(), "only rank 0 writes"
    ranks = json.loads((run / "environment.json").read_text())["ranks"]
    assert [rank["shares_run_directory"] for rank in ranks] == [True, False]


def test_figures_of_a_run_without_a_shared_directory(tmp_path: Path) -> None:
    on_ranks(2, train, tmp_path, False, run__figures=True)
    names = {path.name for path in (tmp_path / "0" / "run" / "figures").iterdir()}
    assert {"curves.png", "confusion_matrix.png", "per_class.csv"} <= names
    assert not (tmp_path / "1").exists()


def test_a_directory_that_only_rank_0_may_write(tmp_path: Path) -> None:
    def run(directory: Path) -> float:
        own = directory if os.environ["RANK"] == "0" else Path("/proc/nowhere")
        return fitted(
            settings(own), net(), train_data=Images(56), val_data=Images(50)
        ).progress.step

    assert on_ranks(2, run, tmp_path) == [4, 4]


def test_a_resume_costs_one_read(tmp_path: Path) -> None:
    on_ranks(2, train, tmp_path, True, train__max_steps=4)

    def reads(directory: Path) -> list[str]:
        calls: list[str] = []
        for storage in (checkpoint, best_model):
            load = storage.load

            def counted(path: Path, storage: Any = storage, load: Any = load) -> Any:
                calls.append(storage.__name__)
                return load(path)

            storage.load = counted
        train(directory, True)
        return calls

    assert on_ranks(2, reads, tmp_path) == [
        [checkpoint.__name__, best_model.__name__],
        [],
    ]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, reference: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """On every rank, and saying so; a run none of whose checkpoints can be read is one error."""
    on_ranks(2, train, tmp_path, False, train__max_steps=4)
    checkpoints = tmp_path / "0" / "run" / "checkpoints"
    newest, before = checkpoint.newest_first(checkpoints)
    (newest / "model.safetensors").write_bytes(b"damaged")
    for last, best, _ in on_ranks(2, train, tmp_path, False):
        assert largest_difference(last, reference[0]) < 1e-12
        assert largest_difference(best, reference[1]) < 1e-12
    output = capfd.readouterr().out
    assert f"resumed after step {int(before.name[-8:])}" in output
    assert output.count("set aside as damaged_step_00000004") == 1

    for path in checkpoint.newest_first(checkpoints):
        (path / "model.safetensors").write_bytes(b"damaged")

    def resume(directory: Path) -> str:
        with pytest.raises(LockstepError, match="no checkpoint can be read") as caught:
            train(directory, False)
        return str(caught.value)

    first, second = on_ranks(2, resume, tmp_path)
    assert first == second


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_best_model_costs_figures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The run ends with its summary all the same; who asks for the best model is told."""

    def fit(directory: Path) -> None:
        changes = settings(directory, run__figures=True)
        fitted(changes, net(), train_data=Images(103), val_data=Images(50))

    draw = drawing.draw

    def damage_and_draw(run: Any, directory: Path, **more: Any) -> Any:
        file = directory / "best" / "model.safetensors"
        if run.ranks.is_main and damage == "flip":
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif run.ranks.is_main:
            file.unlink()
        return draw(run, directory, **more)

    monkeypatch.setattr(drawing, "draw", damage_and_draw)
    on_ranks(2, fit, tmp_path)
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["steps"] == 8
    with pytest.raises(LockstepError, match=r"is not what was written|cannot be read"):
        best_model.load(run)


def test_lost_rows_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    on_ranks(1, train, tmp_path, True, train__max_steps=4)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([lines[0], "{damaged\n", lines[2]]))
    on_ranks(1, train, tmp_path, True)
    # The epoch's row comes after its checkpoint, so that counts one row less.
    expected = f"has 2 rows where the checkpoint counted {len(lines) - 1}"
    assert expected in capfd.readouterr().out


def test_a_signal_stops_a_run_without_a_shared_directory(tmp_path: Path) -> None:
    code = (
        "import os, sys; from trainer.commands.train import main; from trainer.process.exit import exit_process; "
        f"exit_process(main(['run.dir={tmp_path}/' + os.environ['RANK'], *sys.argv[1:]]))"
    )
    arguments = [
        "train.epochs=1000",
        "train.log_every=5",
        "run.figures=false",
        "wandb.mode=disabled",
    ]
    program = Program(["-c", code, *arguments], ranks=2)
    rows = tmp_path / "0" / "digits" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 240
        while not (rows.exists() and rows.read_text().count("\n") > 3):
            assert time.monotonic() < deadline
            assert program.is_running()
            time.sleep(0.05)
        os.kill(program.pids[1], signal.SIGTERM)
        # `wait` would signal the other rank, as launchers do.
        while program.is_running():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        result = program.wait(timeout=1)
    finally:
        program.kill()
    assert program.exit_statuses == [143, 143], result.stderr
    assert result.stderr.count("a checkpoint is kept") == 1
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64]
)
def test_tensors_of_any_dtype_and_strides_are_broadcast(dtype: torch.dtype) -> None:
    def exchange() -> list[Tensor]:
        ranks = Ranks("fp32")
        whole = (torch.arange(48).reshape(2, 3, 2, 4) * (1 - ranks.rank)).to(dtype)
        shapes = [
            whole,
            whole.to(memory_format=torch.channels_last),
            whole[:, :, :, 1],
            whole[:0],
            whole[0, 0, 0, 3],
        ]
        for tensor in shapes:
            ranks.broadcast_tensor(tensor)
        named = {"a": whole[0, 0, 0, 0], "b": whole} if ranks.is_main else {}
        return [
            *(tensor.clone() for tensor in shapes),
            *ranks.broadcast_tensors(named).values(),
        ]

    first, second = on_ranks(2, exchange)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def folder_of_images(root: Path, count: int) -> None:
    for part in ("train", "val"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (4, 4), number).save(
                    root / part / name / f"{number}.png"
                )


def failure_with_own_root(directory: Path) -> tuple[str, str]:
    try:
        root = str(own_directory(directory))
        Trainer(
            config(
                directory,
                data__name="folder",
                data__root=root,
                batch__size=4,
                batch__micro_size=2,
            )
        )
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing failed"


def test_data_that_one_machine_lacks_is_one_message(tmp_path: Path) -> None:
    folder_of_images(tmp_path / "0", 2)
    first, second = on_ranks(2, failure_with_own_root, tmp_path)
    assert first == second
    assert first[0] == "DataError"
    assert f"{tmp_path / '1'} is not a folder" in first[1]
    assert "(on rank 1 of 2, machine " in first[1]


def test_other_data_on_one_machine_is_one_message(tmp_path: Path) -> None:
    folder_of_images(tmp_path / "0", 2)
    folder_of_images(tmp_path / "1", 2)
    assert on_ranks(2, failure_with_own_root, tmp_path) == [("", "nothing failed")] * 2
    Image.new("L", (4, 4)).save(tmp_path / "1" / "val" / "a" / "x.png")
    first, second = on_ranks(2, failure_with_own_root, tmp_path)
    assert first == second
    assert first[0] == "DataError"
    assert "the val samples of folder on rank 1 (" in first[1]
    assert "5 samples and 4 samples" in first[1]


EVALUATE_ON_OWN_MACHINE = """
import os, sys
os.environ["LOCAL_WORLD_SIZE"] = "1"
from trainer.__main__ import run
sys.argv = ["lockstep", "evaluate", "{}/" + os.environ.get("RANK", "0") + "/digits"]
run()
"""


def evaluate(directory: Path, ranks: int) -> CompletedProcess[str]:
    """The command where each process is on a machine of its own."""
    code = EVALUATE_ON_OWN_MACHINE.format(directory)
    return run_program(["-c", code], ranks=ranks)


def test_evaluate_reads_the_config_on_the_first_machine_alone(tmp_path: Path) -> None:
    settings = ["train.max_steps=2", "wandb.mode=disabled", f"run.dir={tmp_path / '0'}"]
    assert run_program(["train.py", "run.figures=false", *settings]).returncode == 0
    alone, of_two = evaluate(tmp_path, 1), evaluate(tmp_path, 2)
    assert of_two.returncode == 0, of_two.stderr
    assert not (tmp_path / "1").exists()
    assert "val/accuracy" in of_two.stdout
    assert of_two.stdout == alone.stdout
    failed = evaluate(tmp_path / "nowhere", 2)
    assert failed.returncode == 2
    assert failed.stderr.count("is not a run directory") == 1
