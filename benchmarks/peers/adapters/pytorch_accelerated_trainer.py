"""pytorch-accelerated's `Trainer`. As used: its default callbacks, a bar among them. Lean: without any.

https://pytorch-accelerated.readthedocs.io/en/latest/trainer.html
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch.nn.functional as F
from pytorch_accelerated import Trainer
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS

from benchmarks.peers.job import Job, as_is

PACKAGES = ("pytorch-accelerated",)


def train(job: Job) -> None:
    class InTurns(Trainer):  # type: ignore[misc]
        def optimizer_zero_grad(self) -> None:
            super().optimizer_zero_grad()
            job.step_done(self.model)

    model, optimizer = job.model_and_optimizer()
    order = list(chain.from_iterable(job.dealt_batches()))
    loading: dict[str, Any] = {"sampler": order, "num_workers": 0, "pin_memory": False}
    trainer = InTurns(
        model,
        F.cross_entropy,
        optimizer,
        callbacks=DEFAULT_CALLBACKS if job.as_used else (),
    )
    trainer.train(
        job.dataset(),
        num_epochs=1,
        per_device_batch_size=job.workload.micro_size,
        gradient_accumulation_steps=job.workload.cuts_of_rank,
        train_dataloader_kwargs=loading,
        collate_fn=as_is,
    )
