"""Gradients summed after the backward, as with `train.cuda_graphs` on several processes: resumes, limits, the sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, distributed, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    Points,
    config,
    header_of,
    largest_difference,
    mlp,
    state,
)
from tests.recorded_graphs import graphs_on_cpu
from trainer import ConfigError, Trainer
from trainer.core.graphs.refusal import why_eager
from trainer.exact import joint_sum
from trainer.exact.flat_sum import FlatSum
from trainer.process import launcher
from trainer.process.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore")

PLAIN: dict[str, Any] = {"optimizer__momentum": None}


class Gathering(nn.Module):
    """Takes a mean over all processes in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, points: Tensor) -> Tensor:
        result: Tensor = self.layers(points)
        if self.training:
            mean = result.detach().mean()
            distributed.all_reduce(mean)
            result = result + mean
        return result


class Table(nn.Embedding):
    """Has sparse gradients."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.embedding(input, self.weight, sparse=True)


class Embedding(nn.Module):
    """Its table's gradient is sparse."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.layers, self.table = mlp(), table

    def forward(self, points: Tensor) -> Tensor:
        result: Tensor = self.layers(points) + self.table((points[:, 0] > 0).long())
        return result


class Rest(NamedTuple):
    """What the processes of one set show."""

    resumed: list[dict[str, Tensor]]
    gathering: str
    sparse: str
    synchronized: str
    header: str


def trainer_of(directory: Path, model: nn.Module, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "run__proof": "off",
        "train__cuda_graphs": True,
        "train__epochs": 3,
        "batch__micro_size": 7,
    }
    return Trainer(
        config(directory, **(settings | changes)),
        model=model,
        train_data=Points(84, ignored=False),
    )


def resumed(directory: Path, first: bool, second: bool) -> dict[str, Tensor]:
    """The end of a run that stops in its second epoch: with graphs or without, before and after."""
    for stop, is_recorded in ((5, first), (None, second)):
        trainer = trainer_of(
            directory,
            mlp(),
            run__resume="auto",
            train__stop_after=stop,
            train__cuda_graphs=is_recorded,
        )
        trainer.fit()
    return state(trainer)


def rest_of(directory: Path) -> Rest:
    pairs = [(False, False), (True, False), (False, True)]
    with graphs_on_cpu():
        ends = [
            resumed(directory / str(index), *pair) for index, pair in enumerate(pairs)
        ]
        gathering = trainer_of(directory / "gathering", Gathering())
        gathering.fit()
        model = Embedding(Table(4, CLASSES))
        sparse = trainer_of(directory / "sparse", model, **PLAIN)
        with pytest.raises(ConfigError) as caught:
            sparse.fit()
        header = header_of(gathering, directory)["graphs"]
        batch_norm = replace(gathering.config.batch_norm, mode="sync")
        settings = replace(gathering.config, batch_norm=batch_norm)
        synchronized = why_eager(replace(gathering.run, config=settings))
    assert gathering.graphs is not None
    return Rest(
        ends,
        gathering.graphs.reason,
        str(caught.value),
        synchronized,
        header,
    )


def test_resumes_and_what_stays_eager(tmp_path: Path) -> None:
    for rest in on_ranks(2, rest_of, tmp_path):
        for end in rest.resumed[1:]:
            assert largest_difference(end, rest.resumed[0]) <= 1e-12
        assert "exchanges tensors with other processes" in rest.gathering
        assert 'the gradient of "table.weight" is sparse' in rest.sparse
        assert "batch_norm.mode=sync exchanges statistics" in rest.synchronized
        assert "summed over the processes after the backward" in rest.header


# ---------------------------------------------------------------- the sum itself


def sums(rank: int) -> list[Tensor | None]:
    """Two dtypes, memory in two orders, an empty tensor, one used by one rank, one by none."""
    torch.manual_seed(rank)
    parameters = [
        nn.Parameter(torch.zeros(3, 4, 2, 2).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64)),
        nn.Parameter(torch.zeros(5, dtype=torch.float64)),
        nn.Parameter(torch.zeros(0)),
        nn.Parameter(torch.zeros(())),
        nn.Parameter(torch.zeros(7)),
        nn.Parameter(torch.zeros(200)),
    ]
    joint_sum.BYTES_TOGETHER = 300
    ranks = Ranks("fp32")
    total = FlatSum(ranks, parameters)
    for _ in range(2):
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, 2**rank + index)
        parameters[4].grad = None
        if rank:
            parameters[5].grad = None
        total.sum_()
    assert parameters[0].grad is not None
    assert parameters[0].grad.is_contiguous(memory_format=torch.channels_last)
    return [parameter.grad for parameter in parameters]


def sums_of_rank() -> list[Tensor | None]:
    return sums(launcher.rank())


def test_the_sum_of_gradients_of_all_kinds() -> None:
    for gradients in on_ranks(3, sums_of_rank):
        unused = gradients.pop(4)
        assert unused is None
        expected = [7, 7 + 3, 7 + 6, None, 1 + 5, 7 + 18]
        for gradient, value in zip(gradients, expected, strict=True):
            assert gradient is not None
            if value is None:
                assert gradient.numel() == 0
            else:
                assert bool((gradient == value).all())


class SumsNothing:
    """Stands for the ranks."""

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor


def test_a_rank_that_has_all_gradients_reads_nothing() -> None:
    """On `meta`, where there is nothing to read."""
    parameters = [nn.Parameter(torch.zeros(n, device="meta")) for n in (1, 2)]
    total = FlatSum(cast(Ranks, SumsNothing()), parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    total.sum_()
    parameters[0].grad = None
    with pytest.raises(NotImplementedError, match="meta"):
        total.sum_()
