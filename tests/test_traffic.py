"""Collective operations and their bytes in a step, by their law, on 2 to 64 ranks."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import config
from tests.pretended_ranks import Traffic, TrafficLog, one_of
from tests.recorded_graphs import graphs_on_cpu
from tests.test_pretended_gpu import in_a_fork
from trainer import Task, Trainer, WeightedSum
from trainer.data.datasets import ImageArrays
from trainer.exact.exchange import ShardExchange
from trainer.exact.exchange_cost import (
    cheapest_micro_size,
    describe_exchange,
    exchange_cost,
)
from trainer.exact.joint_sum import neighbours
from trainer.exact.plan import Plan
from trainer.exact.tree import nodes_of_range
from trainer.process.levels import ranks_per_machine
from trainer.process.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore")

WORLDS = (2, 8, 64)
FLOAT = 4  # bytes
MORE_THAN_A_BUCKET = 2600  # width of a net with more than DDP's 25 MiB


def net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 36, width),
        nn.Linear(width, width),
        nn.Linear(width, 10),
    )


def traffic_of_a_step(
    directory: Path,
    micro_batches: int,
    width: int = 10,
    *,
    is_short: bool = False,
    task: Task | None = None,
    **changes: Any,
) -> tuple[Trainer, Traffic]:
    """The third step of rank 0, with `micro_batches` in all; two full steps come before it."""
    samples = micro_batches * (4 if is_short else 6) + (2 if is_short else 0)
    images = torch.randint(256, (samples, 1, 8, 8), dtype=torch.uint8)
    data = ImageArrays(images, torch.randint(10, (len(images),)))
    settings: dict[str, Any] = {
        "batch__size": 2 * micro_batches,
        "batch__micro_size": 2,
        "optimizer__momentum": None,
        "train__precision": "fp32",
        "train__epochs": 1,
        "train__log_every": None,
        "best__metric": "train/loss",
    }
    trainer = Trainer(
        config(directory, **(settings | changes)),
        model=net(width),
        train_data=data,
        task=task,
    )
    with trainer.run.settings():
        trainer.start()
        for index in range(3):
            with TrafficLog() as log:
                trainer.train_step(trainer.plan.step(index))
        trainer.end_loading()
    return trainer, log.traffic


def bytes_of(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize(("world", "a_rank"), [(2, 4), (8, 1), (64, 1), (64, 4)])
@in_a_fork
def test_standard_sends_each_bucket_once_a_step(
    tmp_path: Path, world: int, a_rank: int
) -> None:
    """However many micro-batches a rank runs; the statistics of norm layers send nothing."""
    with one_of(world):
        trainer, traffic = traffic_of_a_step(
            tmp_path, world * a_rank, MORE_THAN_A_BUCKET
        )
    data = trainer.reduction._model._get_ddp_logging_data()
    buckets = data["rebuilt_bucket_sizes"].split(", ")
    assert len(buckets) > 1
    assert traffic.calls == {"ddp": len(buckets)}
    assert traffic.bytes == {"ddp": bytes_of(trainer.module)}


@pytest.mark.parametrize("is_short", [False, True])
@in_a_fork
def test_with_graphs_a_step_sends_all_gradients_after_the_backward(
    tmp_path: Path, is_short: bool
) -> None:
    """Replayed or eager, with idle ranks or not; and a number for each parameter: how many ranks have used it."""
    with one_of(8), graphs_on_cpu():
        trainer, traffic = traffic_of_a_step(
            tmp_path, 16, MORE_THAN_A_BUCKET, is_short=is_short, train__cuda_graphs=True
        )
    parameters = list(trainer.module.parameters())
    pieces = len(list(neighbours(parameters)))
    assert pieces > 1
    assert traffic.calls == {"allreduce": pieces}
    uses = FLOAT * len(parameters)
    assert traffic.bytes["allreduce"] == bytes_of(trainer.module) + uses


@in_a_fork
def test_a_step_with_idle_ranks_sends_all_parameters_in_one_piece(
    tmp_path: Path,
) -> None:
    """With a number for each parameter: how many ranks have used it."""
    with one_of(8):
        trainer, traffic = traffic_of_a_step(tmp_path, 16, is_short=True)
    parameters = list(trainer.module.parameters())
    uses = FLOAT * len(parameters)
    assert traffic.calls == {"allreduce": 1}
    assert traffic.bytes["allreduce"] == bytes_of(trainer.module) + uses


class Scaled(Task):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def loss_sum(self, output: Tensor, targets: Tensor) -> WeightedSum:
        total = F.cross_entropy(output * self.scale, targets, reduction="sum")
        return WeightedSum(total, len(targets))


@in_a_fork
def test_the_parameters_of_a_loss_are_one_sum_more(tmp_path: Path) -> None:
    """No rank asks the others which of them it has used: that is summed with them."""
    with one_of(8):
        _, traffic = traffic_of_a_step(tmp_path, 16, task=Scaled())
    assert traffic.calls["allreduce"] == 1
    assert traffic.bytes["allreduce"] == 2 * FLOAT


@in_a_fork
def test_weights_that_depend_on_values_send_one_number_a_micro_batch(
    tmp_path: Path,
) -> None:
    with one_of(8):
        _, traffic = traffic_of_a_step(tmp_path, 16, loss__class_weights=[1.0] * 10)
    assert traffic.calls["allreduce"] == 1
    assert traffic.bytes["allreduce"] == 8 * 16  # in fp64


@pytest.mark.parametrize(("world", "a_rank"), [(2, 4), (2, 3), (8, 1), (8, 3), (64, 3)])
@in_a_fork
def test_bitwise_exchanges_shards_or_two_whole_nodes(
    tmp_path: Path, world: int, a_rank: int
) -> None:
    """Of gradients, statistics and a number for each parameter, by which all know that it was used."""
    with one_of(world):
        trainer, traffic = traffic_of_a_step(
            tmp_path, world * a_rank, run__reproducibility="bitwise"
        )
    uses = len(list(trainer.module.parameters())) * FLOAT
    statistics = 2 * 4 * FLOAT
    node = bytes_of(trainer.module) + statistics + uses
    if (world, a_rank) == (2, 4):
        assert traffic.calls == {"send": 1, "recv": 1}
        assert traffic.bytes["send"] == node
        return
    shard = -(-node // (world * FLOAT)) * FLOAT
    nodes = 2 if a_rank == 3 else 1
    assert traffic.calls == {
        "alltoall_base": 1,
        "send": world - 1,
        "recv": world - 1,
    }
    assert traffic.bytes["alltoall_base"] == nodes * world * shard
    assert traffic.bytes["send"] == (world - 1) * shard


class OneOfMany(Ranks):
    """A rank of a pretended group, without Accelerate."""

    def __init__(self, rank: int, count: int, machines: int = 1) -> None:
        self.rank, self.count, self.device = rank, count, torch.device("cpu")
        self._a_machine = count // machines
        self._device_timeout = timedelta(seconds=1)

    @property
    def machines(self) -> list[str]:
        return [f"node{rank // self._a_machine}" for rank in range(self.count)]


def exchanged_by(ranks: Ranks, plan: Plan, tensor: Tensor) -> Traffic:
    """What a rank hands over in an exchange of one tensor."""
    step = plan.step(0)
    nodes = nodes_of_range(*step.ranks[ranks.rank], len(step.micro_batches))
    exchange = ShardExchange(ranks, [tensor])
    with TrafficLog() as log:
        exchange.sum(step, [[[tensor]] for _ in nodes])
    return log.traffic


def sent_by(rank: int, plan: Plan, tensor: Tensor) -> float:
    """Bytes that leave a rank in an exchange of one tensor, in those of a ring all-reduce of it."""
    traffic = exchanged_by(OneOfMany(rank, plan.ranks), plan, tensor)
    others = (plan.ranks - 1) / plan.ranks
    sent = traffic.bytes["alltoall_base"] * others + traffic.bytes["send"]
    return sent / (2 * others * tensor.nbytes)


@pytest.mark.parametrize("world", [2, 3, 8])
@in_a_fork
def test_the_law_of_the_exchange(world: int) -> None:
    """The busiest rank sends what `exchange_cost` says, whatever the number of micro-batches."""
    tensor = torch.zeros(24)
    sent: Counter[int] = Counter()
    counts = [*range(world, 6 * world + 2), 12 * world, 16 * world, 305]
    for rank in range(world):
        with one_of(world, rank):
            for micro_batches in counts:
                plan = plan_of(micro_batches, 1, world)
                most = max(sent[micro_batches], sent_by(rank, plan, tensor))
                sent[micro_batches] = most
    for micro_batches in counts:
        assert sent[micro_batches] == exchange_cost(micro_batches, world)


@pytest.mark.parametrize(("machines", "a_machine"), [(2, 8), (3, 4)])
@in_a_fork
def test_what_a_machine_has_crosses_the_network_once(
    machines: int, a_machine: int
) -> None:
    """Of several machines, a rank sends a whole node within its machine, and its share of a machine's node beyond."""
    world = machines * a_machine
    elements = 10 * world
    tensor = torch.zeros(elements)
    for micro_batches in (world, 3 * world, 5 * world - 1):
        most_between = 0.0
        for rank in range(world):
            plan = plan_of(micro_batches, 1, world)
            with one_of(world, rank):
                traffic = exchanged_by(OneOfMany(rank, world, machines), plan, tensor)
            ranges = plan.step(0).ranks
            first = rank - rank % a_machine
            of_machine = ranges[first][0], ranges[first + a_machine - 1][1]
            own = len(nodes_of_range(*ranges[rank], micro_batches))
            shared = len(nodes_of_range(*of_machine, micro_batches))
            share = tensor.nbytes // a_machine
            assert traffic.calls["alltoall_base"] == 2
            assert (
                traffic.bytes["alltoall_base"] == own * tensor.nbytes + shared * share
            )
            assert traffic.bytes["send"] == share // machines * (
                (machines - 1) + (a_machine - 1) * machines
            )
            most_between = max(most_between, (shared + 1) / 2)
        cost = exchange_cost(micro_batches, world, a_machine)
        assert cost == max(most_between, exchange_cost(micro_batches, world))


@pytest.mark.parametrize(
    ("machines", "a_machine"),
    [("aabb", 2), ("aaaa", 4), ("abcd", 1), ("abab", 1), ("aab", 1), ("aabbb", 1)],
)
def test_levels_need_as_many_ranks_in_a_row_on_each_machine(
    machines: str, a_machine: int
) -> None:
    assert ranks_per_machine(list(machines)) == a_machine


def plan_of(size: int, micro_size: int, ranks: int) -> Plan:
    return Plan(
        samples=size,
        batch_size=size,
        micro_size=micro_size,
        ranks=ranks,
        epochs=1,
        seed=0,
    )


@pytest.mark.parametrize("ranks", [*WORLDS, 3, 6])
def test_what_the_exchange_costs(ranks: int) -> None:
    for power in (1, 2, 4, 8, 32):
        assert exchange_cost(power * ranks, ranks) == 1
        assert exchange_cost(3 * power * ranks, ranks) == 1.5
    if ranks > 8:
        return  # the same, and slow
    for most_a_rank, bound in ((8, 2.5), (32, 4.5)):
        counts = range(ranks, most_a_rank * ranks + 1)
        assert max(exchange_cost(count, ranks) for count in counts) <= bound


@pytest.mark.parametrize(
    ("size", "micro_size", "ranks"), [(96, 4, 8), (28, 5, 2), (86, 3, 8), (100, 7, 6)]
)
def test_the_advice_makes_it_cheap(size: int, micro_size: int, ranks: int) -> None:
    plan = plan_of(size, micro_size, ranks)
    advised = cheapest_micro_size(plan)
    assert advised is not None
    assert f"1 × with batch.micro_size={advised}" in describe_exchange(plan)
    assert describe_exchange(plan_of(size, advised, ranks)) == ""


def test_the_header_has_the_advice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(directory: Path, **changes: Any) -> None:
        data = ImageArrays(
            torch.zeros(96, 1, 8, 8, dtype=torch.uint8),
            torch.zeros(96, dtype=torch.int64),
        )
        settings = config(directory, batch__size=24, train__max_steps=1, **changes)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        Trainer(settings, model=model, train_data=data).fit()

    on_ranks(
        2, run, tmp_path / "3", batch__micro_size=4, run__reproducibility="bitwise"
    )
    line = (
        "exchange   1.5 × the bytes of a ring all-reduce; 1 × with batch.micro_size=3"
    )
    assert line in capfd.readouterr().out
    on_ranks(2, run, tmp_path / "standard", batch__micro_size=4)
    assert "exchange" not in capfd.readouterr().out
