"""Copies that look at what they copy: the same bits on any number of threads, and no value not finite is missed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.core import not_finite
from trainer.core.not_finite import refuse_not_finite
from trainer.errors import LockstepError
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.storage import checkpoint, threaded_copy
from trainer.storage.checkpoint import Checkpoint, Progress
from trainer.storage.snapshot_writer import SnapshotWriter
from trainer.storage.threaded_copy import Copy, copy_all


def tensors() -> list[Tensor]:
    """Of many dtypes, sizes and strides."""
    draw = torch.Generator().manual_seed(0)
    large = torch.randn(70, 9, 11, generator=draw)
    return [
        large,
        large.double(),
        large.bfloat16(),
        large.half().permute(2, 0, 1),
        torch.complex(large, -large).conj(),
        large[:, 2:4],
        torch.tensor(3.0),
        torch.empty(0, 4),
        torch.arange(10_000),
        large > 0,
    ]


@pytest.fixture(params=[(1, 1), (1, 3), (2, 1)], ids=str)
def threads(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's threads and processors, and parts of 4 kB."""
    of_torch, processors = request.param
    monkeypatch.setattr(threaded_copy, "PART", 1 << 12)
    monkeypatch.setattr(threaded_copy, "usable_processors", lambda: processors)
    before = torch.get_num_threads()
    torch.set_num_threads(of_torch)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_copies_have_the_same_bits_and_what_is_finite_is_seen() -> None:
    sources = tensors()
    copies = [Copy(t, torch.empty(t.shape, dtype=t.dtype)) for t in sources]
    floats = {
        i for i, t in enumerate(sources) if t.is_floating_point() or t.is_complex()
    }
    assert copy_all(copies, look=True) == floats
    for source, target in copies:
        assert torch.equal(source, target)
    assert copy_all(copies, look=False) == set()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_never_missed(value: float) -> None:
    for index in range(6):
        for position in (0, 3000, -1):
            sources = [t.resolve_conj().contiguous() for t in tensors()[:6]]
            flat = sources[index].view(-1)
            flat[position % len(flat)] = value
            copies = [Copy(t, torch.empty_like(t)) for t in sources]
            assert copy_all(copies, look=True) == {0, 1, 2, 3, 4, 5} - {index}


def test_what_copying_has_seen_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = nn.Linear(3, 4)
    whole = ModelAndLoss(nn.Sequential(linear, nn.BatchNorm1d(4)), nn.Identity())
    state = {"momentum": torch.zeros(3)}
    looked_at: list[str] = []

    def note(tensors: dict[str, Tensor]) -> None:
        looked_at.extend(tensors)

    monkeypatch.setattr(not_finite, "first_not_finite", note)
    refuse_not_finite(whole, state, 1)
    every = list(looked_at)
    assert {"0.weight", "momentum", "1.running_var"} < set(every)
    looked_at.clear()
    known = [linear.weight.detach(), state["momentum"], torch.zeros(3)]
    refuse_not_finite(whole, state, 1, known)
    assert sorted({*every} - {*looked_at}) == ["0.weight", "momentum"]


@pytest.mark.parametrize("room", [True, False])
def test_nothing_is_written_before_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, room: bool
) -> None:
    if not room:
        monkeypatch.setattr(SnapshotWriter, "_has_room_for", lambda *_: False)
    weights = {"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")])}
    content = Checkpoint(weights, {}, {}, Progress(step=1), {})
    known: list[list[list[float]]] = []

    def check(finite: Sequence[Tensor]) -> None:
        known.append([tensor.tolist() for tensor in finite])
        raise LockstepError("not finite")

    def write(_: Any) -> None:
        pytest.fail("written")

    writer = SnapshotWriter(print)
    with pytest.raises(LockstepError, match="not finite"):
        writer.write(checkpoint.take(content), write, check)
    assert writer.close() is None
    assert known == ([[[1.0, 1.0, 1.0]]] if room else [[]])
