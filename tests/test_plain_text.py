"""Names that users give are printed as they are, also where rich would make a style or a picture of a part of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import trainer
from trainer.commands.explain_output import print_lesson
from trainer.commands.predict_output import print_predictions
from trainer.config.load import load
from trainer.errors import DataError
from trainer.inspection.explain import Dissection

NAMES = ("Net[red]", "Loss[/]:warning:", "Sgd[bold]")
PACKAGE = Path(trainer.__file__).parent
# Prints texts of its own alone, and may not import from the room of `plain_console`.
FIXED_TEXTS = PACKAGE / "core" / "cache_progress.py"


def test_explain_names_model_loss_and_optimizer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ["batch.size=4", "batch.micro_size=2", "data.name=fake"]
    report = Dissection(load(None, overrides)).report()
    model, loss, optimizer = NAMES
    report |= {"model": model, "optimizer": optimizer}
    report["loss"] |= {"name": loss}
    print_lesson(report, 3)
    printed = capsys.readouterr().out
    for name in NAMES:
        assert name in printed


class Unreadable:
    """A predictor that can read none of its files."""

    signature = SimpleNamespace(name=str)

    def predict(self, files: list[Path]) -> Iterator[tuple[Path, Any]]:
        for file in files:
            yield file, DataError(f"{file} is no image")


def test_predict_names_files_without_an_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    predictor: Any = Unreadable()
    files = [Path("x[copy].png"), Path("y:smile:.png")]
    with pytest.raises(DataError, match="2 of 2 files have no answer"):
        print_predictions(predictor, files, top=1, as_json=True, masks=None)
    errors = capsys.readouterr().err.splitlines()
    assert errors == [f"error: {file} is no image" for file in files]


def test_no_other_console_of_rich_is_made() -> None:
    # `Console(active=…)` is the run's own.
    made = re.compile(r"\bConsole\((?!active=)")
    makers = set()
    for file in PACKAGE.rglob("*.py"):
        if made.search(file.read_text()):
            makers.add(file)
    assert makers == {PACKAGE / "reporting" / "plain_text.py", FIXED_TEXTS}
