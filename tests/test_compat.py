"""Runs of an earlier version still resume, evaluate, predict, compare and replay, to the numbers that it gave.

`tests/data/run_before_rooms/README.md` says how they were made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.distributed.ranks import on_ranks
from tests.programs import run_program
from trainer import Trainer, load
from trainer.components.task import CrossEntropy
from trainer.config.model_sections import LossConfig
from trainer.storage import checkpoint
from trainer.storage.run_directory import check_same_run

DATA = Path(__file__).parent / "data" / "run_before_rooms"
EXPECTED = json.loads((DATA / "expected.json").read_text())
KERNELS = "d85b47ac"  # `kernels_sha256` where the runs were made
TIMINGS = {"samples_per_second", "data_wait"}


def kernels_sha256() -> str:
    """A digest of a few updates of a net like the runs', by PyTorch alone: equal where kernels give equal bits.

    Another CPU or another PyTorch gives other last digits, and no exact number can be asked of it.
    """
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.float64):
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 10),
        ).to(dtype)
        with torch.no_grad():
            for parameter in net.parameters():
                numbers = (
                    torch.arange(parameter.numel(), dtype=torch.float64)
                    * 7919
                    % 101
                    / 101
                    - 0.5
                )
                parameter.copy_(numbers.reshape(parameter.shape))
        images = (torch.arange(64 * 64) * 7919 % 256).reshape(64, 1, 8, 8).to(
            dtype
        ) / 255
        targets = torch.arange(64) % 10
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            nn.functional.cross_entropy(net(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        for parameter in net.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()[:8]


@pytest.fixture(scope="module")
def same_kernels() -> bool:
    (digest,) = on_ranks(1, kernels_sha256)
    return bool(digest == KERNELS)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A copy of the runs: those in the repository stay as they are."""
    return Path(shutil.copytree(DATA, tmp_path / "runs"))


def command(*arguments: object, status: int = 0) -> str:
    """What `python -m trainer …` prints."""
    process = run_program(["-m", "trainer", *arguments])
    assert process.returncode == status, process.stderr
    return process.stdout


def resume(run: Path, *overrides: str) -> dict[str, Any]:
    overrides = ("run.resume=auto", f"run.dir={run.parent}", *overrides)
    return Trainer(load(run / "config.yaml", overrides)).fit()


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMINGS}
        for line in lines
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_run_resumes_to_what_the_old_code_gave(
    runs: Path, ranks: int, same_kernels: bool
) -> None:
    """In bitwise mode, on any number of ranks: weights, buffers, optimizer and every logged number."""
    run = runs / "interrupted"
    summary = on_ranks(ranks, resume, run)[0]
    expected = EXPECTED["undisturbed"]
    for name in ("steps", "samples_seen", "best_epoch"):
        assert summary[name] == expected["summary"][name]
    if same_kernels:
        assert {name: summary[name] for name in expected["summary"]} == expected[
            "summary"
        ]
        assert rows(run) == expected["rows"]
        return
    for row, expected_row in zip(rows(run), expected["rows"], strict=True):
        inexact = {
            name: value for name, value in expected_row.items() if name != "digest"
        }
        assert {name: row[name] for name in inexact} == pytest.approx(inexact, rel=1e-9)


def test_a_finished_run_trains_further(runs: Path) -> None:
    run = runs / "finished"
    before = rows(run)
    (summary,) = on_ranks(1, resume, run, "train.epochs=3")
    assert summary["steps"] == 18
    assert rows(run)[: len(before)] == before
    assert rows(run)[-1]["step"] == 18
    assert rows(run)[-1]["train/epoch_loss"] < before[-1]["train/epoch_loss"]


def test_its_checkpoints_are_whole_and_without_other_objects() -> None:
    for path in sorted(DATA.glob("*/checkpoints/step_*")):
        loaded = checkpoint.load(path)
        assert path.name == f"step_{loaded.progress.step:08d}"
        assert loaded.stateful == {}


def test_evaluate(runs: Path) -> None:
    printed = command("evaluate", runs / "finished", "wandb.mode=disabled")
    for name, value in EXPECTED["evaluate"].items():
        assert f"val/{name}  {value:.5f}"[:-1] in printed
    assert "epoch 2" in printed


def test_predict(runs: Path, tmp_path: Path) -> None:
    pixels = (np.arange(64) * 4).astype(np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    answer = json.loads(
        command(
            "predict", runs / "finished", tmp_path / "image.png", "--top", 10, "--json"
        )
    )
    probabilities = {entry["class_id"]: entry["probability"] for entry in answer["top"]}
    assert [probabilities[i] for i in range(10)] == pytest.approx(
        EXPECTED["predict"], rel=1e-4
    )
    assert [entry["class"] for entry in answer["top"]] == [
        str(entry["class_id"]) for entry in answer["top"]
    ]


def test_compare(runs: Path) -> None:
    printed = command("compare", runs / "finished", runs / "interrupted", status=1)
    for part in (
        "run.reproducibility: standard | bitwise",
        "train.precision: fp32 | fp64",
        "the same samples",
        "4 logged steps compared, 2 to 8",
        "2.3771358728408813 | 2.377135886425447",
    ):
        assert part in " ".join(printed.split())


def test_replay(runs: Path, same_kernels: bool) -> None:
    """Step 10, from the checkpoint of step 8."""
    again = json.loads(command("replay", runs / "finished", "--step", 10, "--json"))
    expected = EXPECTED["replay"]
    assert again["began_after"] == expected["began_after"]
    assert len(again["samples"]) == expected["samples"]
    assert again["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert again["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    if same_kernels:
        assert again["loss"] == expected["loss"]
        assert set(again["logged"]) == {"train/loss", "lr", "grad_norm"}
        for logged, replayed in again["logged"].values():
            assert replayed == logged
        assert again["digests"] == {"10": [expected["digest"]] * 2}


def test_classes_named_by_the_path_of_an_earlier_version_are_found() -> None:
    """A task given from Python is written by its import path, and modules have moved since."""
    defined_in = LossConfig(name=f"{CrossEntropy.__module__}.CrossEntropy")
    assert defined_in.name == "trainer.components.task.CrossEntropy"
    config = load("configs/digits.yaml", ["loss.name=trainer.task.CrossEntropy"])
    assert config.loss.name == "trainer.components.task.CrossEntropy"
    before = config.to_dict(digests=True)
    before["loss"]["name"] = "trainer.task.CrossEntropy"
    check_same_run(before, config, config.run)
