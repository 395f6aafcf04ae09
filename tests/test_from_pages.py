"""The pages of docs/from/: what they show of Lockstep runs, and what they show of installed libraries does, too."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.distributed.ranks import on_ranks
from tests.test_configs import image_folder
from trainer import Trainer
from trainer.config.load import load

PAGES = Path(__file__).parents[1] / "docs" / "from"
QUIET = '"run": {"figures": False}, "wandb": {"mode": "disabled"}, '
# The trainers of the pages with Python, by the package that theirs needs.
PYTHON_PAGES = {
    "accelerate": "accelerate",
    "lightning": "lightning",
    "hf-trainer": "transformers",
    "pytorch-accelerated": "pytorch_accelerated",
}


def blocks(page: str, heading: str, language: str) -> list[str]:
    text = (PAGES / f"{page}.md").read_text()
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def run_block(program: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process and a directory of its own: a program may set what lasts, and writes where it is."""
    monkeypatch.chdir(directory)
    on_ranks(1, exec, compile(program, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_ours_runs_and_learns(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page == "hf-trainer":
        pytest.importorskip("transformers")
    programs = blocks(page, "Ours", "python")
    assert programs
    for program in programs:
        assert "settings = {" in program
        quiet = program.replace("settings = {", f"settings = {{{QUIET}")
        run_block(quiet, tmp_path, monkeypatch)
        summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
        rows = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
        last = json.loads(rows[-1])
        assert last["step"] == summary["steps"] and last["step"] % 23 == 0
        # The ViT is small, and has three epochs.
        least = 0.5 if page == "hf-trainer" else 0.85
        assert last["val/accuracy"] > least


@pytest.mark.parametrize("page", PYTHON_PAGES)
@pytest.mark.slow
def test_theirs_runs_where_it_is_installed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(PYTHON_PAGES[page]) is None:
        pytest.skip(f"{PYTHON_PAGES[page]} is not installed")
    (program,) = blocks(page, "Theirs", "python")
    run_block(program, tmp_path, monkeypatch)


def test_the_config_beside_timms_command(tmp_path: Path) -> None:
    """Its keys and transforms, on a few small images."""
    (text,) = blocks("timm", "Ours", "yaml")
    (command,) = blocks("timm", "Ours", "sh")
    path = tmp_path / "seresnet34.yaml"
    assert command.split()[-1] == path.name
    path.write_text(text)
    root = tmp_path / "images"
    image_folder(root)
    (root / "val").rename(root / "validation")
    # A small model instead of the one that is named, which need only exist.
    timm = pytest.importorskip("timm")
    assert timm.is_model(load(path).model.args["model_name"])
    small = [
        *("model.model_name=resnet10t", "run.proof=off"),
        *(f"data.root={root}", "data.workers=0", "data.train_transforms.0.size=32"),
        *("data.val_transforms.0.size=40", "data.val_transforms.1.size=32"),
        *("batch.size=4", "batch.micro_size=2", "train.max_steps=2"),
        # fp16 is for GPUs.
        *("train.precision=fp32", f"run.dir={tmp_path}", "run.figures=false"),
        "wandb.mode=disabled",
    ]
    written = load(path)
    assert written.batch.size == 4 * 256

    def fit() -> int:
        return int(Trainer(load(path, small)).fit()["steps"])

    assert on_ranks(1, fit) == [2]
