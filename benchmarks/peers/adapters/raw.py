"""The leanest loop that does the work, written by hand. As used: with a tqdm bar and the loss in it at each step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.peers.job import Job

PACKAGES = ("torch",)


def train(job: Job) -> None:
    model: Any
    model, optimizer = job.model_and_optimizer()
    workload, data = job.workload, job.data
    micro, each = workload.micro_size, workload.cuts_of_rank
    if job.ranks > 1:
        torch.distributed.init_process_group("gloo")
        model = DistributedDataParallel(model)
    bar = tqdm(total=job.total_steps, file=job.bar_file) if job.as_used else None

    def fetch(ids: Tensor) -> tuple[Tensor, Tensor]:
        images = data.images.index_select(0, ids)
        return images.float().div_(255), data.targets.index_select(0, ids)

    order = torch.as_tensor(job.plan.permutation(0))
    for first in range(0, len(order), workload.batch_size):
        start = first + job.rank * each * micro
        for cut in range(each):
            inputs, targets = fetch(
                order[start + cut * micro : start + (cut + 1) * micro]
            )
            last = cut == each - 1
            with nullcontext() if job.ranks == 1 or last else model.no_sync():
                loss = F.cross_entropy(model(inputs), targets)
                if each > 1:
                    loss = loss / each
                loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if bar is not None:
            bar.set_postfix(loss=loss.item() * each)
            bar.update()
        job.step_done(model)
