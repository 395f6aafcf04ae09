"""Ignite's engine. As used: its `ProgressBar` with a running average of the loss, and a running accuracy.

https://docs.pytorch.org/ignite/generated/ignite.engine.create_supervised_trainer.html
"""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import ProgressBar
from ignite.metrics import Accuracy, RunningAverage

from benchmarks.peers.job import Job

PACKAGES = ("pytorch-ignite",)


def train(job: Job) -> None:
    if job.ranks > 1:
        idist.initialize("gloo")
    net, optimizer = job.model_and_optimizer()
    model: Any = idist.auto_model(net)
    each = job.workload.cuts_of_rank
    if job.ranks == 1:
        engine = create_supervised_trainer(
            model,
            optimizer,
            F.cross_entropy,
            gradient_accumulation_steps=each,
            output_transform=outputs_and_loss,
        )
    else:
        engine = Engine(accumulating_without_sync(model, optimizer, each))
    if job.as_used:
        loss = RunningAverage(output_transform=lambda output: output[2])
        loss.attach(engine, "loss")
        accuracy = RunningAverage(Accuracy(output_transform=lambda output: output[:2]))
        accuracy.attach(engine, "accuracy")
        ProgressBar(file=job.bar_file).attach(engine, ["loss", "accuracy"])

    @engine.on(Events.ITERATION_COMPLETED(every=each))
    def take_turns() -> None:
        job.step_done(net)

    engine.run(job.loader(), max_epochs=1)


def outputs_and_loss(
    inputs: Any, targets: torch.Tensor, outputs: torch.Tensor, loss: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """What a step leaves for the metrics."""
    return outputs, targets, loss.item()


def accumulating_without_sync(
    model: Any, optimizer: torch.optim.Optimizer, each: int
) -> Any:
    """Its own accumulation exchanges gradients in every micro-batch; users write this step in its place."""

    def update(engine: Engine, batch: Any) -> Any:
        inputs, targets = batch
        is_last = engine.state.iteration % each == 0
        model.train()
        with torch.enable_grad() if is_last else model.no_sync():
            outputs = model(inputs)
            loss = F.cross_entropy(outputs, targets)
            (loss / each).backward()  # type: ignore[no-untyped-call]
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
        return outputs_and_loss(inputs, targets, outputs, loss)

    return update
