"""What ranks do between them where tensors are on GPUs: shown with tensors of the CPU, on real processes."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import distributed, nn

from tests.distributed.ranks import on_ranks
from trainer.process.ranks import Ranks

GPU = torch.device("cuda", 0)


def gathered(device: torch.device) -> list[float]:
    ranks = Ranks("fp32")
    ranks.device = device
    whole = torch.zeros(ranks.count, 2)
    with patch.object(
        distributed, "batch_isend_irecv", side_effect=AssertionError("point to point")
    ):
        ranks.all_gather_by_sends(torch.full((2,), float(ranks.rank)), whole)
    return [float(value) for value in whole.flatten()]


def test_shards_of_gpus_are_not_sent_point_to_point() -> None:
    assert on_ranks(3, gathered, GPU) == [[0, 0, 1, 1, 2, 2]] * 3
    with pytest.raises(AssertionError, match="point to point"):
        on_ranks(2, gathered, torch.device("cpu"))


def flags_of_hosts() -> tuple[list[bool], list[str]]:
    """The flags of all ranks, and the kinds of device that were asked."""
    ranks = Ranks("fp32")
    ranks.device = GPU
    devices: list[str] = []
    all_reduce = distributed.all_reduce

    def record(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        devices.append(tensor.device.type)
        return all_reduce(tensor, *args, **kwargs)

    with patch.object(distributed, "all_reduce", record):
        return ranks.any_rank_each([ranks.rank == 1, False, True]), devices


def test_ranks_agree_on_flags_without_their_gpus() -> None:
    assert on_ranks(2, flags_of_hosts) == [([True, False, True], ["cpu"])] * 2


def device_ids() -> object:
    """What DDP is told of devices by a process that sees one GPU and is not the first on its machine."""
    ranks = Ranks("fp32")
    seen: dict[str, Any] = {}

    def ddp(model: nn.Module, **arguments: Any) -> nn.Module:
        seen.update(arguments)
        return model

    state = ranks.accelerator.state
    state._shared_state["distributed_type"] = "MULTI_GPU"
    with patch.object(nn.parallel, "DistributedDataParallel", ddp):
        ranks.prepare(nn.Linear(1, 1))
    return seen["device_ids"], seen["output_device"]


def test_ddp_keeps_to_the_device_of_the_model() -> None:
    """LOCAL_RANK may be larger than the number of the GPUs that the process sees (`srun --gpus-per-task=1`)."""
    assert on_ranks(2, device_ids) == [(None, None)] * 2
