"""Histograms of weights and gradients: what they count, of which tensors, and in which steps."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from trainer.exact.plan import Plan
from trainer.reporting.wandb.histograms import (
    BINS,
    MAX_TENSORS,
    HistogramObserver,
    take_histograms,
)


class RecordingRun:
    """Takes the histograms in place of a W&B run."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_histograms(self, step: int, histograms: dict[str, Any]) -> None:
        assert histograms
        self.steps.append(step)


def with_gradients(module: nn.Module, value: float = 1.0) -> nn.Module:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return module


def test_every_value_is_counted_once() -> None:
    layer = with_gradients(nn.Linear(6, 8))
    histograms = take_histograms(layer)
    assert set(histograms) == {
        "weights/weight",
        "weights/bias",
        "gradients/weight",
        "gradients/bias",
    }
    counts, edges = histograms["weights/weight"]
    assert sum(counts) == 48
    assert len(counts) == BINS and len(edges) == BINS + 1
    assert (edges[0], edges[-1]) == pytest.approx(
        (layer.weight.min().item(), layer.weight.max().item())
    )
    # All values are 1: a bin needs a width.
    assert histograms["gradients/weight"].edges[0] == 0.5
    assert sum(histograms["gradients/weight"].counts) == 48


def test_frozen_parameters_and_tensors_that_are_not_finite_have_none() -> None:
    layer = with_gradients(nn.Linear(6, 8))
    layer.bias.grad = None
    layer.weight.grad[0, 0] = math.inf
    assert set(take_histograms(layer)) == {"weights/weight"}


def test_a_large_model_has_those_of_some_tensors() -> None:
    model = with_gradients(
        nn.Sequential(*(nn.Linear(1, 1) for _ in range(MAX_TENSORS)))
    )
    names = [name for name in take_histograms(model) if name.startswith("weights/")]
    assert len(names) == MAX_TENSORS
    assert (
        names[0] == "weights/0.weight"
        and names[-1] == f"weights/{MAX_TENSORS - 1}.weight"
    )


def test_the_observer_takes_them_every_so_many_steps() -> None:
    run = RecordingRun()
    observer = HistogramObserver(with_gradients(nn.Linear(2, 2)), run, every=4)  # type: ignore[arg-type]
    plan = Plan(samples=20, batch_size=2, micro_size=2, ranks=1, epochs=1, seed=0)
    for step in plan.steps(0):
        observer.gradient(step)
    assert run.steps == [4, 8]


def test_counts_are_those_of_numpy() -> None:
    layer = with_gradients(nn.Linear(50, 40))
    counts, edges = take_histograms(layer)["weights/weight"]
    expected, _ = np.histogram(layer.weight.detach().double().numpy(), edges)
    # A value on an edge.
    assert sum(abs(a - b) for a, b in zip(counts, expected, strict=True)) <= 2


def test_bitwise_mode_refuses_nothing_in_them_on_a_gpu() -> None:
    """torch.histc has no deterministic CUDA kernel; a count of whole numbers without weights has."""
    with patch("torch.histc", side_effect=AssertionError("refused")):
        assert take_histograms(with_gradients(nn.Linear(6, 8)))
