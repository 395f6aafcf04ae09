"""The loop of Lightning Fabric's guide to accumulation. As used: with tqdm, and a loss logged by `fabric.log`.

https://lightning.ai/docs/fabric/stable/advanced/gradient_accumulation.html
"""

from __future__ import annotations

import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.peers.job import LOG_EVERY, Job

PACKAGES = ("lightning",)


def train(job: Job) -> None:
    fabric = Fabric(
        accelerator="cpu",
        devices=job.ranks,
        strategy="ddp" if job.ranks > 1 else "auto",
        loggers=CSVLogger(str(job.directory)) if job.as_used else None,
    )
    fabric.launch()
    model, optimizer = fabric.setup(*job.model_and_optimizer())
    loader = fabric.setup_dataloaders(job.loader(), use_distributed_sampler=False)
    bar = tqdm(total=job.total_steps, file=job.bar_file) if job.as_used else None
    each = job.workload.cuts_of_rank
    for index, (inputs, targets) in enumerate(loader, start=1):
        accumulating = index % each != 0
        with fabric.no_backward_sync(model, enabled=accumulating):
            loss = F.cross_entropy(model(inputs), targets)
            fabric.backward(loss / each)
        if accumulating:
            continue
        optimizer.step()
        optimizer.zero_grad()
        if bar is not None:
            bar.update()
            if index // each % LOG_EVERY == 0:
                fabric.log("loss", loss, step=index // each)
        job.step_done(model)
