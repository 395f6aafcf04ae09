"""Hugging Face's `Trainer`. As used: its bar and a logged loss. Lean: neither.

https://huggingface.co/docs/transformers/main_classes/trainer
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.job import LOG_EVERY, SGD, Job, as_is

PACKAGES = ("transformers",)


class WithLoss(nn.Module):
    """A net as the trainer wants it: called by names, and giving its own loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def train(job: Job) -> None:
    net, optimizer = job.model_and_optimizer()

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return list(chain.from_iterable(job.dealt_batches()))

    class InTurns(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            job.step_done(net)

    arguments = TrainingArguments(
        output_dir=str(job.directory),
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=job.workload.micro_size,
        gradient_accumulation_steps=job.workload.cuts_of_rank,
        learning_rate=SGD["lr"],
        max_grad_norm=0,  # no clipping
        save_strategy="no",
        report_to="none",
        logging_strategy="steps" if job.as_used else "no",
        logging_steps=LOG_EVERY,
        disable_tqdm=not job.as_used,
        remove_unused_columns=False,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = InOrder(
        WithLoss(net),
        arguments,
        data_collator=as_is,
        train_dataset=job.dataset(as_dict=True),
        callbacks=[InTurns()],
        optimizers=(optimizer, constant),
    )
    trainer.train()
