"""Shared memory and file handles that would run out are named before the first step, with what to set."""

from __future__ import annotations

import resource
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, config, conv_net
from trainer import Config, Trainer
from trainer.config.schema import DataConfig
from trainer.core import loader_limits
from trainer.core.loader_limits import check_loader_limits, loader_note
from trainer.data.workers import WorkerLoader
from trainer.errors import ConfigError

# A micro-batch of 7 float64 images of (2, 5, 5), and their int64 labels: a page each. An evaluation's of 103: 11 pages
# and one, of which there is one batch for a rank, or of 52 for each of two.
PAGE = 4096
TRAINING = 2 * 3 * 2 * PAGE
EVALUATION = (11 + 1) * PAGE
# The whole set of 103 is read at once, whatever the batches: first the one, then the other.
ON_DEVICE = EVALUATION


def error_of(directory: Path, free: int, files: int | None, **changes: Any) -> str:
    """The error of a run where so much shared memory is free and so many files may be open; "" for none."""
    usage = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=free))
    loader_limits.shutil = usage  # type: ignore[attr-defined]
    settings = config(
        directory,
        **({"data__workers": 2, "data__prefetch": 3, "batch__micro_size": 7} | changes),
    )
    trainer = Trainer(
        settings, model=conv_net(), train_data=Images(), val_data=Images()
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        check_loader_limits(trainer.run)
    except ConfigError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return ""


def test_shared_memory_that_would_run_out_is_named_at_the_start(
    tmp_path: Path,
) -> None:
    needed = TRAINING + EVALUATION

    def all_cases() -> list[str]:
        return [
            error_of(tmp_path, needed, None),
            error_of(tmp_path, needed - 1, None),
            error_of(tmp_path, 0, None, data__workers=0),
            error_of(tmp_path, 0, None, data__collate="lists"),
            error_of(tmp_path, ON_DEVICE, None, data__on_device=True),
            error_of(tmp_path, ON_DEVICE - 1, None, data__on_device=True),
        ]

    [(enough, short, without, unknown, *on_device)] = on_ranks(1, all_cases)
    assert on_device[0] == ""
    assert "that keep 3 times 256 samples (data.on_device) ready" in on_device[1]
    assert "set data.workers or data.prefetch lower, or give it more" in on_device[1]
    assert (enough, without, unknown) == ("", "", "")
    assert short == (
        f"data.workers: 2 loader processes that keep 3 micro-batches ready (data.prefetch) need {needed / 1e6:.1f} MB "
        f"of shared memory, and /dev/shm has {(needed - 1) / 1e6:.1f} MB free; set data.workers, data.prefetch, "
        f"batch.micro_size or batch.eval_size lower, or give it more (docker run --shm-size=1g)"
    )


def test_so_much_loading_ahead_that_training_would_wait_is_refused(
    tmp_path: Path,
) -> None:
    (message,) = on_ranks(1, error_of, tmp_path, 2**60, None, data__prefetch=10**7)
    assert message == (
        "data.prefetch: 10,000,000 micro-batches would be asked of each loader process before the first step begins; "
        "set at most 1,000, of which a few are as fast"
    )


def test_ranks_of_one_machine_share_it(tmp_path: Path) -> None:
    of_rank = TRAINING + (6 + 1) * PAGE
    enough = on_ranks(2, error_of, tmp_path, 2 * of_rank, None, batch__eval_size=52)
    short = on_ranks(2, error_of, tmp_path, 2 * of_rank - 1, None, batch__eval_size=52)
    assert enough == ["", ""]
    assert short[0] == short[1]
    assert "the 2 loader processes of each of 2 ranks that keep" in short[0]


def test_file_handles_that_would_run_out_are_named_at_the_start(
    tmp_path: Path,
) -> None:
    def both() -> list[str]:
        plenty = 2**40
        return [
            error_of(tmp_path, plenty, 1000, data__workers=2),
            error_of(tmp_path, plenty, 100, data__workers=2),
        ]

    [(enough, short)] = on_ranks(1, both)
    assert enough == ""
    assert (
        "open files, and a process may have 100; raise the limit (ulimit -n 1" in short
    )


@pytest.mark.parametrize("key", ["SHARED_MEMORY", "OPEN_FILES"])
def test_a_system_that_does_not_tell_is_not_asked(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_limits, key, tmp_path / "none")
    free, files = (0, None) if key == "SHARED_MEMORY" else (2**40, 100)
    assert on_ranks(1, error_of, tmp_path, free, files) == [""]


def test_more_loader_processes_than_processors_are_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader_limits, "usable_processors", lambda: 2)
    notes = [loader_note(Config(data=DataConfig(workers=count))) for count in (2, 3)]
    assert notes == [
        "",
        "data.workers=3 are more than the 2 processors here, which is seldom faster and takes memory",
    ]
    # Else torch says it in each rank, for each set, when a loader is made and when it is first used.
    with pytest.warns(UserWarning, match="DataLoader will create"):
        DataLoader([0], num_workers=10_000)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WorkerLoader([0], num_workers=10_000)  # type: ignore[arg-type]
