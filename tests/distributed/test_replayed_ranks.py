"""`train.cuda_graphs` on several processes in standard mode, with graphs on the CPU.

A rank that replays exchanges gradients as one that is eager does: the run has the bits of one that records nothing, and
those of one process but for rounding.
"""

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
    HASHES,
    IGNORED,
    Images,
    Points,
    config,
    conv_net,
    header_of,
    largest_difference,
    mlp,
    rows_of,
    state,
)
from tests.recorded_graphs import GraphsOnCpu, graphs_on_cpu
from trainer import ConfigError, Trainer
from trainer.core.graphs.refusal import why_eager
from trainer.exact import joint_sum
from trainer.exact.flat import FlatReduction
from trainer.exact.flat_sum import FlatSum
from trainer.process import launcher
from trainer.process.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES = 86  # the last of 4 steps has 2 samples: one micro-batch, which leaves other ranks idle


class NeverRecords(GraphsOnCpu):
    """A device on which each recording fails."""

    def record(self, work: Any) -> Any:
        raise RuntimeError("no graphs today")


class RecordsOnMain(GraphsOnCpu):
    """Only rank 0's recordings succeed."""

    def record(self, work: Any) -> Any:
        if launcher.rank():
            raise RuntimeError("no graphs on this rank")
        return super().record(work)


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, and a buffer that follows the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv_net(), nn.Dropout(0.3))
        self.register_buffer("mean", torch.zeros(()))
        self.mean: Tensor

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(images.mean().detach(), alpha=0.1)
        result: Tensor = self.layers(images) + self.mean
        return result


class BySize(nn.Module):
    """Its second head is used by micro-batches of two samples alone, its third by none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.always = mlp()
        self.small, self.never = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        result: Tensor = self.always(points)
        return result + self.small(points) if len(points) == 2 else result


class ByPixels(nn.Module):
    """Its second head is used by the value of a pixel, which no graph can ask for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.always, self.sometimes = mlp(), nn.Linear(6, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        result: Tensor = self.always(points)
        return result + self.sometimes(points) if points[0, 0] < -0.3 else result


MODELS: dict[str, type[nn.Module]] = {
    "net": Net,
    "by size": BySize,
    "by pixels": ByPixels,
}
ADAM: dict[str, Any] = {"optimizer__name": "adamw", "optimizer__momentum": None}
PLAIN: dict[str, Any] = {"optimizer__momentum": None}
UNUSED: dict[str, Any] = {
    "train__find_unused_parameters": True,
    "optimizer__weight_decay": 0.1,
}


class Case(NamedTuple):
    """A run: its net, its config, and whether it is replayed."""

    net: str
    changes: dict[str, Any]
    is_replayed: bool = True


CASES = {
    "plain": Case("net", {}),
    "clipped": Case("net", {"train__max_grad_norm": 0.1, "ema__decay": 0.9}),
    "autocast": Case("net", {"train__precision": "bf16", "train__channels_last": True}),
    "thawed": Case(
        "net",
        {
            "model__freeze": ["layers.0.0"],
            "model__unfreeze": {2: ["layers.0.0"]},
            "train__epochs": 5,
        },
    ),
    "unused": Case("by size", UNUSED | {"batch__micro_size": 2, "batch__size": 6}),
    "used by pixels": Case("by pixels", UNUSED, is_replayed=False),
    "not finite": Case("net", {"train__non_finite": "skip"}),
    "weights": Case("by size", UNUSED | ADAM | {"loss__ignore_index": IGNORED}),
}
# On three processes one replays and two are eager.
ON_THREE = ("plain", "unused", "used by pixels", "not finite")


RECORDERS: dict[str, type[GraphsOnCpu] | None] = {
    "replayed": GraphsOnCpu,
    "eager": NeverRecords,  # with the same exchange
    "mixed": RecordsOnMain,
    "ddp": None,
}


def data_for(name: str) -> Points:
    if CASES[name].net.startswith("by"):
        return Points(SAMPLES, ignored=name == "weights")
    data = Images(SAMPLES)
    if name == "not finite":
        data.points[5] = torch.inf
    return data


class End(NamedTuple):
    """What a run leaves, to the bit, and its tensors."""

    bits: list[Any]
    tensors: dict[str, Tensor]
    replays: int
    is_flat: bool


def end_of(
    directory: Path, name: str, recorder: GraphsOnCpu | None, **changes: Any
) -> End:
    """A run of a case; without a recorder, on a device without graphs."""
    case = CASES[name]
    settings: dict[str, Any] = {
        "run__proof": "off",
        "train__cuda_graphs": True,
        "train__epochs": 3,
        "batch__micro_size": 7,
    }
    settings |= case.changes | changes
    if recorder is None:
        settings["train__cuda_graphs"] = False
    torch.manual_seed(3)
    with graphs_on_cpu(recorder):
        trainer = Trainer(
            config(directory, **settings),
            model=MODELS[case.net](),
            train_data=data_for(name),
        )
        summary = trainer.fit()
    (run,) = directory.iterdir()
    bits = [summary[key] for key in HASHES] + rows_of(run)
    replays = 0 if trainer.graphs is None else trainer.graphs.replays
    is_flat = isinstance(trainer.reduction, FlatReduction)
    return End(bits, state(trainer), replays, is_flat)


def ends_of(
    directory: Path, names: list[str], kinds: list[str]
) -> dict[str, dict[str, End]]:
    """The end of each case in each way."""
    joint_sum.BYTES_TOGETHER = 500  # several pieces
    ends: dict[str, dict[str, End]] = {}
    for name in names:
        ends[name] = {}
        for kind in kinds:
            make_recorder = RECORDERS[kind]
            recorder = None if make_recorder is None else make_recorder()
            ends[name][kind] = end_of(directory / name / kind, name, recorder)
    return ends


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, End]]:
    """The runs on one process."""
    directory = tmp_path_factory.mktemp("one")
    ends: list[dict[str, dict[str, End]]]
    ends = on_ranks(1, ends_of, directory, list(CASES), ["replayed"])
    return ends[0]


@pytest.mark.parametrize(
    ("count", "kinds", "names"),
    [
        (2, ["replayed", "eager", "ddp"], list(CASES)),
        (3, ["mixed", "eager"], list(ON_THREE)),
    ],
)
def test_ranks_that_replay_sum_as_eager_ones_do(
    tmp_path: Path,
    of_one: dict[str, dict[str, End]],
    count: int,
    kinds: list[str],
    names: list[str],
) -> None:
    of_ranks = on_ranks(count, ends_of, tmp_path, names, kinds)
    for rank, ends in enumerate(of_ranks):
        for name in names:
            first, eager, *others = (ends[name][kind] for kind in kinds)
            may_replay = CASES[name].is_replayed and not (kinds[0] == "mixed" and rank)
            assert (first.replays > 0) is may_replay, name
            assert eager.replays == 0
            assert first.is_flat
            assert eager.is_flat
            assert first.bits == eager.bits, name
            bound = 1e-5 if name == "autocast" else 1e-12
            for other in (of_one[name]["replayed"], *others):
                difference = largest_difference(first.tensors, other.tensors)
                assert difference <= bound, name
            assert not any(other.is_flat for other in others)


# ---------------------------------------------------------------- a resume, and what is left eager


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
    """Has sparse gradients and does not say so."""

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
    sparse: tuple[bool, str]
    hidden: str
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
        table = nn.Embedding(4, CLASSES, sparse=True)
        sparse = trainer_of(directory / "sparse", Embedding(table), **PLAIN)
        sparse.fit()
        table = Table(4, CLASSES)
        hidden = trainer_of(directory / "hidden", Embedding(table), **PLAIN)
        with pytest.raises(ConfigError) as caught:
            hidden.fit()
        header = header_of(gathering, directory)["graphs"]
        batch_norm = replace(gathering.config.batch_norm, mode="sync")
        settings = replace(gathering.config, batch_norm=batch_norm)
        synchronized = why_eager(replace(gathering.run, config=settings))
    assert gathering.graphs is not None
    return Rest(
        ends,
        gathering.graphs.reason,
        (isinstance(sparse.reduction, FlatReduction), why_eager(sparse.run)),
        str(caught.value),
        synchronized,
        header,
    )


def test_resumes_and_what_stays_eager(tmp_path: Path) -> None:
    for rest in on_ranks(2, rest_of, tmp_path):
        for end in rest.resumed[1:]:
            assert largest_difference(end, rest.resumed[0]) <= 1e-12
        assert "exchanges tensors with other processes" in rest.gathering
        assert rest.sparse == (
            False,
            "an embedding with sparse=True has sparse gradients",
        )
        assert "train.cuda_graphs: a gradient is sparse" in rest.hidden
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
