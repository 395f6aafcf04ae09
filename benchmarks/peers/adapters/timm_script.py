"""A loop with timm's parts in the manner of its training script, which its package does not hold.

As used: it reads the loss at each update for its running mean, and logs every 50 updates. Lean: at those alone.
https://huggingface.co/docs/timm/training_script
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, reduce_tensor
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.job import LOG_EVERY, SGD, Job

PACKAGES = ("timm",)


def train(job: Job) -> None:
    model: Any
    model, _ = job.model_and_optimizer()
    optimizer = create_optimizer_v2(
        model,
        opt="momentum",  # SGD; "sgd" would be Nesterov's
        lr=SGD["lr"],
        momentum=SGD["momentum"],
        weight_decay=SGD["weight_decay"],
        filter_bias_and_bn=False,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="step", num_epochs=1, decay_epochs=10**6, warmup_epochs=0
    )
    if job.ranks > 1:
        torch.distributed.init_process_group("gloo")
        model = DistributedDataParallel(model)
    criterion = nn.CrossEntropyLoss()
    losses, batch_time = AverageMeter(), AverageMeter()
    each, updates = job.workload.cuts_of_rank, 0
    began = time.time()
    for index, (inputs, targets) in enumerate(job.loader(), start=1):
        is_last = index % each == 0
        with nullcontext() if job.ranks == 1 or is_last else model.no_sync():
            loss = criterion(model(inputs), targets) / each
            loss.backward()
        if not is_last:
            continue
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        batch_time.update(time.time() - began)
        is_logged = updates % LOG_EVERY == 0
        if job.as_used or is_logged:
            mean = (
                reduce_tensor(loss.detach(), job.ranks)
                if job.ranks > 1 and is_logged
                else loss
            )
            losses.update(mean.item() * each, job.workload.batch_size)
        if is_logged:
            print(
                f"{updates}: loss {losses.val:.3f} ({losses.avg:.3f}) {batch_time.avg:.3f} s"
            )
        scheduler.step_update(num_updates=updates, metric=losses.avg)
        began = time.time()
        job.step_done(model)
