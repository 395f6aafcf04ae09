"""The loop of Accelerate's guide to gradient accumulation. As used: its tqdm, and a loss that `gather` averages.

https://huggingface.co/docs/accelerate/usage_guides/gradient_accumulation
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import tqdm

from benchmarks.peers.job import LOG_EVERY, Job

PACKAGES = ("accelerate",)


def train(job: Job) -> None:
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=job.workload.cuts_of_rank
    )
    model, optimizer = job.model_and_optimizer()
    # The prepared scheduler is stepped at each update; this one changes nothing.
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10**9)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, job.loader(dealt=True), scheduler
    )
    bar = tqdm(total=job.total_steps, file=job.bar_file) if job.as_used else None
    steps = 0
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            steps += 1
            if bar is not None:
                bar.update()
                if steps % LOG_EVERY == 0:
                    bar.set_postfix(
                        loss=accelerator.gather(loss.detach()).mean().item()
                    )
            job.step_done(model)
