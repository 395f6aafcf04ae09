"""One training step taken apart, for learning and for debugging.

Nothing is computed a second way: the run's own `train_step` is watched by torch's hooks and by the meter, which sees
each micro-batch's loss with its graph. What is reported is what training does.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from trainer.config.schema import Config
from trainer.core.metrics import Meter
from trainer.data.loading import TrainLoader
from trainer.exact.batch_norm import norm_layers
from trainer.exact.plan import Step
from trainer.inspection.autograd_chain import chain
from trainer.trainer import Trainer

SHOWN = 4  # values of a tensor, samples of a batch

Values = dict[str, Any]  # a tensor's shape, L2 norm and first values; plain, for JSON


@dataclass
class Watched:
    """What is seen of one step."""

    micro_batches: list[Values] = field(default_factory=list)
    samples: list[Values] = field(default_factory=list)
    chain: list[Values] = field(default_factory=list)
    gradients: dict[str, dict[str, Values | None]] = field(default_factory=dict)  # by parameter, by stage
    statistics: dict[str, dict[str, Values]] = field(default_factory=dict)  # by layer, by stage
    updates: dict[str, Values] = field(default_factory=dict)
    reduced: dict[str, Tensor] = field(default_factory=dict)


class WatchingMeter(Meter):
    """The run's meter, which also notes each micro-batch's loss and, of the first, graph, samples and statistics."""

    def watch(self, trainer: Trainer) -> Watched:
        self._trainer, self.seen = trainer, Watched()
        return self.seen

    def add(self, loss: Tensor, weight: Tensor | int, output: Any, targets: Any) -> None:
        seen = self.seen
        if not seen.micro_batches:
            seen.chain = chain(loss, self._trainer.module)
            seen.samples = _samples(self._trainer, output, targets)
            _note_statistics(seen, self._trainer, "after_first")
        total, count = loss.item(), float(weight)
        mean = total / count if count else None
        seen.micro_batches.append({"loss_sum": total, "weight": count, "mean": mean})
        super().add(loss, weight, output, targets)


class Dissected:
    """A run's first step, and the second with and without zero_grad between them: on one process, nothing written."""

    def __init__(self, config: Config) -> None:
        self.trainer = Trainer(replace(config, data=replace(config.data, workers=0)))  # a few samples need no helpers
        self.meter = WatchingMeter(self.trainer.task, self.trainer.ranks, exact=self.trainer.bitwise)
        self.trainer.meter = self.meter
        self._parameters = {n: p for n, p in self.trainer.module.named_parameters() if p.requires_grad}
        self._before: dict[str, Tensor] = {}
        self._hook_up()

    def report(self) -> dict[str, Any]:
        """The whole report, as plain values."""
        trainer, plan = self.trainer, self.trainer.plan
        step = plan.step(0)
        first = self._run(step)
        return {
            "config": trainer.config.run.name,
            "model": trainer.config.model.name,
            "parameters": sum(p.numel() for p in trainer.module.parameters()),
            "precision": trainer.config.train.precision,
            "reproducibility": trainer.config.run.reproducibility,
            "batch": self._batch(step, first),
            "loss": self._loss(step, first),
            "chain": first.chain,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "optimizer": type(trainer.optimizer).__name__,
            "gradient_scale": 1.0 if trainer.precision.scaler is None else trainer.precision.scaler.get_scale(),
            "max_grad_norm": trainer.config.train.max_grad_norm,
            "grad_norm": self._norm(first),
            "gradients": first.gradients,
            "updates": first.updates,
            "batch_norm": {
                "momentum_per": trainer.config.batch_norm.momentum_per,
                "micro_batches": len(step.micro_batches),
                "layers": first.statistics,
            },
            "without_zero_grad": self._without_zero_grad(first),
        }

    def _hook_up(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._note_gradient, name))  # type: ignore[no-untyped-call]
        self.trainer.optimizer.register_step_pre_hook(lambda *_: self._note_reduced())

    def _note_gradient(self, name: str, parameter: Tensor) -> None:
        """After a backward: the meter has counted the micro-batches before this one."""
        stages = self.meter.seen.gradients[name]
        stages["after_last"] = values(parameter.grad)
        if not self.meter.seen.micro_batches:
            stages["after_first"] = stages["after_last"]

    def _note_reduced(self) -> None:
        seen = self.meter.seen
        for name, parameter in self._parameters.items():
            seen.gradients[name]["reduced"] = values(parameter.grad)
            if parameter.grad is not None:
                seen.reduced[name] = parameter.grad.detach().clone()

    def _run(self, step: Step) -> Watched:
        """Do `step`, watched."""
        trainer = self.trainer
        trainer.module.train()
        trainer.batches = TrainLoader(trainer.train_loader, trainer.plan, trainer.ranks.rank, step.number - 1)
        seen = self.meter.watch(trainer)
        stages = ("before", "after_first", "after_last", "reduced")
        for name, parameter in self._parameters.items():
            seen.gradients[name] = {**dict.fromkeys(stages), "before": values(parameter.grad)}
        _note_statistics(seen, trainer, "before")
        before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            trainer.train_step(step)
        finally:
            trainer.batches.close()
        _note_statistics(seen, trainer, "after")
        for name, parameter in self._parameters.items():
            change = parameter.detach() - before[name]
            size = float(before[name].norm())
            seen.updates[name] = values(change) | {"relative": float(change.norm()) / size if size else None}  # type: ignore[operator]
        return seen

    def _batch(self, step: Step, seen: Watched) -> dict[str, Any]:
        trainer = self.trainer
        ids = [trainer.plan.sample_ids(step, index) for index in range(len(step.micro_batches))]
        inputs = trainer.train_loader.peek(ids[0]).inputs
        shown = seen.samples or [{} for _ in ids[0][:SHOWN]]
        return {
            "size": step.size,
            "micro_batches": [len(part) for part in ids],
            "shape": list(inputs.shape) if isinstance(inputs, Tensor) else None,
            "dtype": str(inputs.dtype).removeprefix("torch.") if isinstance(inputs, Tensor) else None,
            "samples": [{"id": int(i), **sample} for i, sample in zip(ids[0], shown, strict=False)],
        }

    def _loss(self, step: Step, seen: Watched) -> dict[str, Any]:
        """The step's loss, Σ sums ÷ Σ weights, as the meter reads it, and the sizes of an epoch's steps."""
        plan = self.trainer.plan
        last = plan.step(plan.steps_per_epoch - 1)
        return {
            "name": self.trainer.config.loss.name,
            "micro_batches": seen.micro_batches,
            "mean": self.meter.read().means().get("loss"),
            "epoch": {"steps": plan.steps_per_epoch, "step_size": step.size, "last_step_size": last.size},
        }

    def _norm(self, seen: Watched) -> float:
        """The whole gradient's norm, before it is clipped."""
        if self.trainer.config.train.max_grad_norm is not None and self.trainer.grad_norm is not None:
            return float(self.trainer.grad_norm)
        return math.hypot(*(float(gradient.double().norm()) for gradient in seen.reduced.values()))

    def _without_zero_grad(self, first: Watched) -> dict[str, Any] | None:
        """The second step's gradient as it is, and as it is where the first one's was left; None in a run of one."""
        trainer = self.trainer
        if trainer.plan.total_steps < 2:
            return None
        state = copy.deepcopy((trainer.module.state_dict(), trainer.optimizer.state_dict()))
        second = self._run(trainer.plan.step(1))
        trainer.module.load_state_dict(state[0])
        trainer.optimizer.load_state_dict(state[1])
        for name, parameter in self._parameters.items():
            parameter.grad = first.reduced.get(name)
        stale = self._run(trainer.plan.step(1))
        return {
            name: {
                "first": first.gradients[name]["reduced"],
                "second": second.gradients[name]["reduced"],
                "both": stale.gradients[name]["reduced"],
            }
            for name in self._parameters
        }


def values(tensor: Tensor | None) -> Values | None:
    """A tensor in a few plain numbers; None for None, which a gradient is before the first backward."""
    if tensor is None:
        return None
    held = tensor.detach()
    first = held.reshape(-1)[:SHOWN].tolist()
    return {"shape": list(held.shape), "norm": float(held.double().norm()), "first": first}


def _note_statistics(seen: Watched, trainer: Trainer, stage: str) -> None:
    kept = {id(layer) for layer in norm_layers(trainer.module)}
    for name, layer in trainer.module.named_modules():
        if isinstance(layer, _NormBase) and id(layer) in kept:
            seen.statistics.setdefault(name, {})[stage] = _statistics(layer)


def _statistics(layer: _NormBase) -> Values:
    counter = layer.num_batches_tracked
    return {
        "mean": values(layer.running_mean),
        "var": values(layer.running_var),
        "batches": None if counter is None else int(counter),
        "momentum": layer.momentum,
    }


def _samples(trainer: Trainer, output: Any, targets: Any) -> list[Values]:
    """The first samples of a micro-batch, each by itself through the run's own loss; none where they are no tensors."""
    if not (isinstance(output, Tensor) and isinstance(targets, Tensor) and len(output) == len(targets)):
        return []
    found = []
    with torch.no_grad():
        for row in range(min(SHOWN, len(output))):
            loss, weight = trainer.task.loss_sum(output[row : row + 1].detach(), targets[row : row + 1])
            sample = {"target": _plain(targets[row]), "output": _plain(output[row].detach())}
            found.append(sample | {"loss_sum": float(loss), "weight": float(weight)})
    return found


def _plain(tensor: Tensor) -> Any:
    """A number, or a few of a flat list."""
    return tensor.item() if tensor.dim() == 0 else tensor.reshape(-1)[:10].tolist()
