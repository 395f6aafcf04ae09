"""The exit status tells a supervisor whether a retry can help: 1 where it may, 2 where it cannot."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.programs import run_program
from tests.test_directory_gone import start
from trainer.config.load import load
from trainer.config.registry import build
from trainer.data.batches import Request
from trainer.data.decoding import decode
from trainer.data.folder import image_folders
from trainer.data.samples import KeyedDataset
from trainer.errors import DataError, LockstepError
from trainer.storage.contents import file_size
from trainer.storage.data_record import file_fingerprint

PASSING = [
    *(
        OSError(number, os.strerror(number), "0.png")
        for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM)
    ),
    MemoryError("of 3 GiB"),
    TimeoutError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
]
LASTING = [
    *(
        OSError(number, os.strerror(number), "0.png")
        for number in (errno.ENOENT, errno.EACCES, errno.EISDIR)
    ),
    OSError("broken data stream when reading image file"),
    ValueError("3 is no label"),
]
CAUSES = [(cause, 1) for cause in PASSING] + [(cause, 2) for cause in LASTING]
EIO = PASSING[0]


def raiser(error: Exception) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


class Failing:
    """A data set whose samples fail."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Any, int]:
        raise self.error


@pytest.mark.parametrize(("cause", "status"), CAUSES, ids=repr)
def test_a_sample_that_cannot_be_read(cause: Exception, status: int) -> None:
    data = KeyedDataset(Failing(cause), None, seed=0, purpose="train")
    error = data[Request(0, 0, np.arange(2))]
    assert isinstance(error, DataError)
    assert error.exit_status == status
    assert "train sample 0" in str(error)
    # It may come from a loader process or from another rank.
    assert pickle.loads(pickle.dumps(error)).exit_status == status


@pytest.mark.parametrize(("cause", "status"), CAUSES, ids=repr)
def test_a_component_that_cannot_be_built(cause: Exception, status: int) -> None:
    with pytest.raises(LockstepError, match=r"^data") as caught:
        build("data", raiser(cause), {})
    assert caught.value.exit_status == status


@pytest.mark.parametrize(("number", "status"), [(errno.EIO, 1), (errno.ENOENT, 2)])
def test_a_file_that_cannot_be_read(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.png"
    error = OSError(number, os.strerror(number), str(path))
    for owner, name, read in (
        (os, "open", lambda: decode(path)),
        (Path, "stat", lambda: file_size(path)),
        (Path, "stat", lambda: file_fingerprint(path)),
        (os, "scandir", lambda: image_folders(tmp_path)),
        (Path, "read_text", lambda: load(path)),
    ):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raiser(error))
            with pytest.raises(LockstepError, match=os.strerror(number)) as caught:
                read()
        assert caught.value.exit_status == status, name


DATA = """
import os
from torch import zeros
class Broken:
    classes = ("a", "b")
    def __init__(self, number: int, train: bool = True): self.number = number
    def __len__(self): return 8
    def __getitem__(self, i):
        if i == 5: raise OSError(self.number, os.strerror(self.number), "5.png")
        return zeros(3, 8, 8), i % 2
"""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("number", "workers", "status"), [(errno.EIO, 1, 1), (errno.ENOENT, 0, 2)]
)
def test_a_run_on_data_that_cannot_be_read(
    number: int, workers: int, status: int, ranks: int, tmp_path: Path
) -> None:
    (tmp_path / "broken_data.py").write_text(DATA)
    overrides = [
        "data.name=broken_data.Broken",
        f"data.number={number}",
        f"data.workers={workers}",
        "batch.size=4",
        "batch.micro_size=2",
        "wandb.mode=disabled",
        f"run.dir={tmp_path / 'runs'}",
        "run.figures=false",
    ]
    end = run_program(
        ["train.py", *overrides],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        ranks=ranks,
    )
    assert end.returncode == status, end.stderr
    (line,) = end.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"sample 5: {type(OSError(number, '')).__name__}" in line
    assert "Traceback" not in end.stderr


# As a person presses it, and as a key that is held down.
@pytest.mark.parametrize(("ranks", "seconds"), [(1, 0.1), (1, 0.02), (2, 0.1)])
def test_ctrl_c_pressed_again_and_again_is_no_traceback(
    tmp_path: Path, ranks: int, seconds: float
) -> None:
    program, _ = start(tmp_path, ranks)
    while program.is_running():
        for pid in program.pids:
            with suppress(ProcessLookupError):  # one may end before the other
                os.kill(pid, signal.SIGINT)
        time.sleep(seconds)
    end = program.wait(180)
    # A rank may notice first that the other one has gone.
    assert 128 + signal.SIGINT in program.exit_statuses
    assert {*program.exit_statuses} <= {1, 128 + signal.SIGINT}
    (line,) = end.stderr.strip().splitlines()
    assert line.startswith(("interrupted; ", "stopped by signal 2 "))
