"""Bitwise mode sends a bucket of gradients while a rank's last backward goes on: when, and never the wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.distributed.ranks import on_ranks
from tests.distributed.small import CLASSES, HASHES, Images, bitwise_config
from trainer import ConfigError, Trainer
from trainer.exact import exchange
from trainer.exact.early_exchange import EarlyExchange


class Net(nn.Module):
    """Norm layers, a layer that is used twice, and one that only some micro-batches use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.conv, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.twice, self.sometimes = nn.Linear(200, 200), nn.Linear(200, 200)
        self.head = nn.Linear(200, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(x))).flatten(1)
        hidden = torch.tanh(self.twice(self.twice(hidden)))
        if x[0].sum() > 0:
            hidden = hidden + self.sometimes(hidden)
        out: Tensor = self.head(hidden)
        return out


class Straight(nn.Sequential):
    """All parameters get one gradient in each backward."""

    def __init__(self) -> None:
        torch.manual_seed(6)
        super().__init__(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(200, 60),
            nn.Linear(60, CLASSES),
        )


class Pruned(Straight):
    """A hook of the user's keeps some weights as they are, and torch takes no note of the change of gradients."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(self._prune)  # type: ignore[no-untyped-call]

    def _prune(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.data.view(-1)[::3] = 0.0


class Nested(nn.Module):
    """Two layers get a second gradient each, in a backward within the backward."""

    def __init__(self) -> None:
        super().__init__()
        layers = list(Straight())
        self.features, self.head = (
            nn.Sequential(*layers[:4]),
            nn.Sequential(*layers[4:]),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x)
        first: Any = checkpoint(self.head, hidden, use_reentrant=True)
        second: Any = checkpoint(self.head, 2 * hidden, use_reentrant=True)
        out: Tensor = first + second
        return out


# Each with whether buckets go early.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], bool]] = {
    "straight": (Straight, {"train__max_grad_norm": 1.0}, True),
    "parts": (Net, {"train__find_unused_parameters": True}, True),
    "pruned": (Pruned, {}, True),
    "nested": (Nested, {}, False),
    "thawed": (
        Straight,
        {"model__freeze": ["4"], "model__unfreeze": {1: ["4"]}},
        True,
    ),
}


def run_all(directory: Path) -> dict[str, tuple[list[str], int]]:
    """The hashes of a run of each case, and how many buckets went early."""
    exchange.BUCKET_BYTES, exchange.LAST_BUCKET_BYTES = 1000, 500
    early = 0

    def start_next(self: EarlyExchange) -> None:
        nonlocal early
        early += 1
        start(self)

    start = EarlyExchange._start_next
    EarlyExchange._start_next = start_next  # type: ignore[method-assign]
    results = {}
    for case, (make_model, changes, _) in CASES.items():
        early = 0
        settings = bitwise_config(directory, case, batch__micro_size=3, **changes)
        trainer = Trainer(settings, model=make_model(), train_data=Images(88))
        summary = trainer.fit()
        hashes = [summary[name] for name in HASHES]
        results[case] = hashes, early
    return results


def test_what_goes_early_is_what_would_go_later(tmp_path: Path) -> None:
    """M = 10, and 2 in each epoch's last step, on 1, 2 and 3 processes."""
    (reference,) = on_ranks(1, run_all, tmp_path / "1")
    for count in (2, 3):
        results = on_ranks(count, run_all, tmp_path / str(count))
        for case, (hashes, _) in reference.items():
            assert [result[case][0] for result in results] == [hashes] * count, case
        early = {case: result[1] > 0 for case, result in results[0].items()}
        assert early == {case: goes_early for case, (*_, goes_early) in CASES.items()}


class Sometimes(Nested):
    """Gradients come in pieces from some step on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 6:
            return super().forward(x)
        hidden = self.features(x)
        out: Tensor = self.head(hidden) + self.head(2 * hidden)
        return out


def message(directory: Path) -> str:
    exchange.BUCKET_BYTES, exchange.LAST_BUCKET_BYTES = 1000, 500
    settings = bitwise_config(directory, "sometimes", batch__micro_size=7)
    # The rank that comes second may only see that the first has ended.
    with pytest.raises((ConfigError, RuntimeError)) as caught:
        Trainer(settings, model=Sometimes(), train_data=Images(88)).fit()
    return str(caught.value)


def test_a_gradient_that_changes_after_it_was_sent_is_named(tmp_path: Path) -> None:
    texts = " ".join(on_ranks(2, message, tmp_path))
    assert "run.reproducibility" in texts
    assert "changes the gradient of head." in texts
