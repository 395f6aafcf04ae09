"""Training from a notebook: the live table, and processes that a cell starts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config, mlp
from trainer import ConfigError, LockstepError, Stopped, Trainer, launch
from trainer.reporting.notebook import NotebookTable

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_the_example_notebook(tmp_path: Path) -> None:
    """Executed by a real kernel: the table's HTML, the run on two processes, and a mistake as one message."""
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    mistake = 'from trainer import load\nload(None, ["train.epochss=1"])'
    notebook.cells.append(nbformat.v4.new_code_cell(mistake))
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    with pytest.raises(CellExecutionError):
        client.execute()
    _, first, second, third = (
        cell for cell in notebook.cells if cell.cell_type == "code"
    )
    (table,) = (item for item in first.outputs if item.output_type == "display_data")
    assert table.data["text/html"].count("<tr>") == 4
    assert "<td>3/3</td>" in table.data["text/html"]
    assert "val/accuracy" in table.data["text/plain"]
    assert "(2, True)" in second.outputs[-1].data["text/plain"]
    printed = "".join(item.get("text", "") for item in second.outputs)
    assert printed.count("2 × cpu") == 1
    (error,) = third.outputs
    assert len(error.traceback) == 1
    assert error.traceback[0].startswith("error: train.epochss: no such key")


def test_errors_of_a_launch_are_one_message(capfd: Any) -> None:
    def fail(where: int) -> None:
        rank = int(os.environ["RANK"])
        if rank == where:
            raise ValueError(f"a defect on rank {rank}")

    with pytest.raises(LockstepError) as caught:
        launch(fail, 1, processes=2)
    assert str(caught.value).count("Traceback") == 1
    assert str(caught.value).endswith("ValueError: a defect on rank 1")
    assert "defect" not in capfd.readouterr().out

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(LockstepError, match=r"rank 0 of 1 was killed by signal 9"):
        launch(end, processes=1)
    with pytest.raises(ConfigError, match="processes: 0 is less than 1"):
        launch(end, processes=0)
    lock = threading.Lock()
    with pytest.raises(LockstepError, match="launch cannot copy"):
        launch(lambda: lock, processes=1)


@pytest.mark.slow
def test_an_interrupt_stops_at_a_step_with_a_checkpoint(tmp_path: Path) -> None:
    """Sent once to the program that called `launch`, as a notebook's stop button does."""
    started = tmp_path / "started"
    settings = config(tmp_path, train__epochs=100_000, batch__micro_size=7)

    class Telling(Trainer):
        def train_step(self, step: Any) -> None:
            super().train_step(step)
            if step.number == 3:
                started.touch()

    def train() -> None:
        Telling(settings, model=mlp(), train_data=Points(ignored=False)).fit()

    def interrupted() -> None:
        process = os.getpid()

        def interrupt() -> None:
            while not started.exists():
                threading.Event().wait(0.1)
            os.kill(process, signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(Stopped, match=r"stopped by signal 2 after step \d+; a che"):
            launch(train, processes=2)
        assert (tmp_path / "run" / "checkpoints" / "last").exists()

    on_ranks(1, interrupted)


def test_a_run_outside_a_notebook_imports_no_ipython(tmp_path: Path) -> None:
    def run() -> bool:
        loaded = "IPython.core.display_functions" in sys.modules
        Trainer(config(tmp_path), model=mlp(), train_data=Points(ignored=False)).fit()
        return loaded == ("IPython.core.display_functions" in sys.modules)

    assert on_ranks(1, run) == [True]


def test_the_table_has_every_metric_beside_its_like() -> None:
    table = NotebookTable()
    sent: list[Any] = []
    table._handle = SimpleNamespace(update=lambda content, raw: sent.append(content))
    row = {"train/loss": 1.5, "train/f1": 0.5, "val/clean/loss": 2.0, "lr": 0.1}
    table.add("1/2", row, 3.0, False)
    table.add("2/2", {**row, "val_ema/loss": 1.0, "step": 3}, 3.0, True)
    table.show("half & half")
    (content,) = sent
    assert content["text/html"].startswith("<pre>half &amp; half</pre><table>")
    heading, first, second = content["text/plain"].splitlines()[1:]
    names = ["train/loss", "val/clean/loss", "val_ema/loss", "train/f1"]
    assert heading.split() == ["epoch", *names, "lr", "time"]
    assert first.split() == [
        "1/2",
        "1.5000",
        "2.0000",
        "–",
        "0.5000",
        "0.1",
        "3.0",
        "s",
    ]
    assert second.endswith("★")
