"""A failure on one rank, or of the disk, ends the run on all ranks with one clear message."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, Points, config, conv_net, fitted, mlp
from trainer import ConfigError, DataError, LockstepError, Trainer
from trainer.exact.determinism import refused_operation
from trainer.storage import checkpoint


def failure(settings: Any, model: nn.Module, data: Any) -> tuple[str, str]:
    try:
        fitted(settings, model, train_data=data, val_data=data)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing failed"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path: Path, ranks: int) -> None:
    """After the first checkpoint no file may exceed 100 kB, so no other checkpoint can be written."""

    def run(directory: Path) -> tuple[str, str]:
        write = checkpoint.write

        def write_and_fill_disk(*args: Any, **more: Any) -> Path:
            path = write(*args, **more)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            return path

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoint.write = write_and_fill_disk
        wide = nn.Sequential(nn.Flatten(), nn.Linear(50, 800), nn.Linear(800, 4))
        settings = config(directory, batch__micro_size=14, best__metric="train/loss")
        return failure(settings, wide, Images(56))

    for kind, message in on_ranks(ranks, run, tmp_path):
        assert kind == "LockstepError"
        assert "cannot write" in message
        assert "run.resume=auto" in message
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in sorted(checkpoints.iterdir())] == ["last", "step_00000002"]
    assert checkpoint.load(checkpoints / "step_00000002").progress.step == 2


class Broken(Points):
    """One sample cannot be read."""

    def __init__(self, bad: int, error: Exception) -> None:
        super().__init__(56, ignored=False)
        self.bad, self.error = bad, error

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i == self.bad:
            raise self.error
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_named_and_never_replaced(tmp_path: Path, workers: int) -> None:
    cases = (
        (DataError("a.png cannot be decoded"), "a.png cannot be decoded"),
        (ValueError("odd"), "train sample 17: ValueError: odd"),
    )
    for number, (error, expected) in enumerate(cases):
        settings = config(tmp_path / str(number), data__workers=workers)
        ((kind, message),) = on_ranks(1, failure, settings, mlp(), Broken(17, error))
        assert kind == "DataError"
        assert message.startswith(expected)
        assert "\n" not in message


def test_a_loss_that_is_not_finite_ends_the_run_and_is_logged(tmp_path: Path) -> None:
    settings = config(tmp_path, optimizer__lr=1e308, batch__micro_size=14)
    for kind, message in on_ranks(2, failure, settings, conv_net(), Images(56)):
        assert kind == "LockstepError"
        assert message.startswith("the loss is ")
    assert "NaN" in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"best__metric": "val/acuracy"},
            'best.metric: "val/acuracy" is not logged by this run; did you mean "val/accuracy"',
        ),
        (
            {"model__num_classes": 3, "data__name": "fake"},
            "model.num_classes: 3 is less than the 10 classes of fake",
        ),
        (
            {"loss__name": "mse", "data__name": "digits"},
            "loss.name: the model gives (28, 10) for targets of shape (28,)",
        ),
    ],
)
def test_combinations_that_cannot_be(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    def run(directory: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            Trainer(config(directory, **changes)).fit()
        return str(caught.value)

    assert on_ranks(1, run, tmp_path)[0].startswith(message)


def test_a_trainer_trains_once(tmp_path: Path) -> None:
    def run(directory: Path) -> str:
        trainer = fitted(
            config(directory),
            mlp(),
            train_data=Points(28, False),
            val_data=Points(28, False),
        )
        with pytest.raises(LockstepError) as caught:
            trainer.fit()
        return str(caught.value)

    assert "make a new one" in on_ranks(1, run, tmp_path)[0]
    assert torch.get_num_threads() == 1


def test_what_a_cuda_kernel_refuses_is_sent_to_the_cpu_for_its_name() -> None:
    """Recognised by PyTorch's message; the error itself needs a GPU."""
    error = RuntimeError(
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"
    )
    assert "CUDA_VISIBLE_DEVICES= before it" in str(refused_operation(error))
    assert refused_operation(RuntimeError("odd")) is None
