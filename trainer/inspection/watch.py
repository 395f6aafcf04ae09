"""What happens within a step, for looking at: inputs, outputs, gradients, statistics, the weights' change."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.core.forward import Forward
from trainer.data.samples import MicroBatch
from trainer.exact.batch_norm import norm_layers
from trainer.exact.plan import Step
from trainer.trainer import Trainer

Numbers = dict[str, float]


class Watch:
    """Watches one `train_step` of `trainer` and leaves it as it is. Waits for the device: not for training.

    `detailed`: the layers, statistics and weights too, and not only the loss.
    """

    def __init__(self, trainer: Trainer, *, detailed: bool) -> None:
        self._trainer = trainer
        self._detailed = detailed
        self._forward: Forward = trainer.forward
        self._handles: list[RemovableHandle] = []
        self._batches: list[tuple[MicroBatch, Any]] = []
        self._losses: list[tuple[float, float]] = []
        self._gradients: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}
        self.layers: dict[str, Numbers] = {}
        self.batch_norm: dict[str, Numbers] = {}

    def __enter__(self) -> Watch:
        self._trainer.forward = self._watched  # type: ignore[assignment]
        if self._detailed:
            module = self._trainer.module
            self._before = {name: p.detach().clone() for name, p in module.named_parameters()}
            self._handles.append(self._trainer.optimizer.register_step_pre_hook(self._see_gradients))
            for name, layer in module.named_modules():
                if not any(layer.children()):
                    self._handles.append(layer.register_forward_hook(self._see_output(name)))
                if layer in norm_layers(module):
                    self._handles.append(layer.register_forward_pre_hook(self._see_statistics(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._trainer.forward = self._forward
        for handle in self._handles:
            handle.remove()

    # ---------------------------------------------------------------- what was seen

    def loss(self) -> float:
        """The loss over the step's targets."""
        weight = math.fsum(weight for _, weight in self._losses)
        return math.fsum(loss for loss, _ in self._losses) / weight if weight else math.nan

    def is_finite(self) -> bool:
        """Whether the loss of every micro-batch is a number; there may be no targets."""
        return all(math.isfinite(loss) for loss, _ in self._losses)

    def grad_norm(self) -> float:
        """The L2 norm of the step's gradient before clipping."""
        if self._trainer.config.train.max_grad_norm is not None and self._trainer.grad_norm is not None:
            return float(self._trainer.grad_norm)
        return math.hypot(*self._gradients.values()) if self._gradients else math.nan  # an fp16 step may be skipped

    def weights(self) -> dict[str, Numbers]:
        """Of each parameter, its norm before the step, its gradient's as applied, and that of its change."""
        seen = {}
        for name, parameter in self._trainer.module.named_parameters():
            before = self._before[name]
            change = (parameter.detach() - before).norm().item()
            seen[name] = {"norm": before.norm().item(), "change": change}
            if name in self._gradients:
                seen[name]["gradient"] = self._gradients[name]
        return seen

    def samples(self, step: Step) -> list[dict[str, Any]]:
        """Id, file, target, micro-batch and loss of each sample, in the order of the step."""
        data = self._trainer.data
        paths = getattr(data.train, "paths", None)
        found = []
        for batch, output in self._batches:
            ids = self._trainer.plan.sample_ids(step, batch.first).tolist()
            for i, sample in enumerate(ids):
                found.append({"id": sample, **({} if paths is None else {"file": paths[sample]})})
                found[-1] |= {"target": _target(batch.targets, i, data.classes), "micro_batch": batch.first}
                found[-1] |= {"loss": self._loss_of(output, batch.targets, i)}
        return found

    def images(self) -> Tensor | None:
        """The images as the model saw them, `(N, C, H, W)` in [0, 1]; None where inputs are no images."""
        inputs = [batch.inputs for batch, _ in self._batches]
        if not all(isinstance(each, Tensor) and each.dim() == 4 for each in inputs):
            return None
        return self._trainer.train_loader.normalize.undo(torch.cat(inputs))

    # ---------------------------------------------------------------- seeing

    def _watched(self, model: nn.Module, batch: MicroBatch, step: Step | None) -> tuple[Any, Tensor, Tensor | int]:
        output, loss, weight = self._forward(model, batch, step)
        self._losses.append((loss.item(), float(weight)))
        if self._detailed:
            self._batches.append((batch, output.detach() if isinstance(output, Tensor) else output))
        return output, loss, weight

    def _see_output(self, name: str) -> Any:
        def see(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                values = output.detach().double()
                finite = values.isfinite()
                seen = values[finite] if finite.any() else values.new_zeros(1)
                numbers = {"least": seen.min().item(), "largest": seen.max().item()}
                _merge(self.layers, name, {**numbers, "least_finite_share": finite.double().mean().item()})

        return see

    def _see_statistics(self, name: str) -> Any:
        def see(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            values = inputs[0].detach().double().transpose(0, 1).flatten(1)
            mean, var = values.mean(1), values.var(1, correction=0)
            kept = {"least_mean": mean.min(), "largest_mean": mean.max(), "least_var": var.min()}
            _merge(
                self.batch_norm, name, {key: v.item() for key, v in kept.items()} | {"largest_var": var.max().item()}
            )

        return see

    def _see_gradients(self, *_: Any) -> None:
        for name, parameter in self._trainer.module.named_parameters():
            if parameter.grad is not None:
                self._gradients[name] = parameter.grad.norm().item()

    @torch.no_grad()
    def _loss_of(self, output: Any, targets: Any, i: int) -> float | None:
        if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
            return None
        return float(self._trainer.task.loss_sum(output[i : i + 1], targets[i : i + 1])[0])


def _merge(kept: dict[str, Numbers], name: str, numbers: Numbers) -> None:
    """Take another micro-batch into a layer's numbers: the least of `least…`, the largest of `largest…`."""
    seen = kept.setdefault(name, {})
    for key, value in numbers.items():
        choose = min if key.startswith("least") else max
        seen[key] = choose(value, seen.get(key, value))


def _target(targets: Any, i: int, classes: list[str] | None) -> Any:
    value = targets[i].tolist() if isinstance(targets, Tensor) else None
    return classes[value] if isinstance(value, int) and classes and 0 <= value < len(classes) else value
