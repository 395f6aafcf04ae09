"""`train.cuda_graphs` on several processes in standard mode, with graphs on the CPU.

A rank that replays exchanges gradients as one that is eager does: the run has the bits of one that records nothing, and
those of one process but for rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    HASHES,
    IGNORED,
    Images,
    Points,
    config,
    conv_net,
    largest_difference,
    mlp,
    rows_of,
    state,
)
from tests.recorded_graphs import GraphsOnCpu, graphs_on_cpu
from trainer import Trainer
from trainer.exact import joint_sum
from trainer.exact.flat import FlatReduction
from trainer.process import launcher

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
