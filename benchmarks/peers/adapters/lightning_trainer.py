"""Lightning's `Trainer`. As used: its bar, a CSV logger, `self.log` of the loss at each step, a checkpoint an epoch.

https://lightning.ai/docs/pytorch/stable/starter/introduction.html
"""

from __future__ import annotations

from typing import Any

import lightning
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from benchmarks.peers.job import Job

PACKAGES = ("lightning",)


def train(job: Job) -> None:
    model, optimizer = job.model_and_optimizer()

    class Module(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any) -> Tensor:
            inputs, targets = batch
            loss = F.cross_entropy(self.net(inputs), targets)
            if job.as_used:
                self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return optimizer

    class InTurns(lightning.Callback):
        """Called after each micro-batch; `global_step` counts updates."""

        def on_train_batch_end(
            self, trainer: lightning.Trainer, *args: Any, **kwargs: Any
        ) -> None:
            if (args[-1] + 1) % job.workload.cuts_of_rank == 0:
                job.step_done(model)

    quiet = {} if job.as_used else dict.fromkeys(SWITCHES, False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=job.ranks,
        strategy="ddp" if job.ranks > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=job.workload.cuts_of_rank,
        use_distributed_sampler=False,
        default_root_dir=job.directory,
        callbacks=[InTurns()],
        **({"logger": CSVLogger(job.directory)} if job.as_used else quiet),
    )
    trainer.fit(Module(model), job.loader())


SWITCHES = (
    "logger",
    "enable_progress_bar",
    "enable_checkpointing",
    "enable_model_summary",
)
