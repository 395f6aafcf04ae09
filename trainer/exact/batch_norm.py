"""BatchNorm whose statistics do not depend on the number of processes.

A micro-batch is normalised by its own statistics. The running statistics end a step as one process would leave
them that runs the step's micro-batches in order: with momentum m and M micro-batches whose statistics are s_v,

    r_M = (1-m)^M r_0 + Σ_v m (1-m)^(M-1-v) s_v.

Training never reads them and they are linear in the s_v, so each rank keeps a *share* of them: it updates its
share on its own micro-batches, ages it for each micro-batch of the others, and the sum of all shares is r_M.
The shares are added up when somebody reads the statistics, and not before.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from trainer.config.schema import BatchNormConfig
from trainer.errors import ConfigError
from trainer.exact.plan import Step
from trainer.process.ranks import Ranks


def configure(model: nn.Module, section: BatchNormConfig, *, ranks: int, device: torch.device) -> nn.Module:
    """The model with its norm layers in the mode that the config asks for. Call it before DDP wraps the model."""
    if section.momentum is not None:
        for layer in norm_layers(model):
            layer.momentum = section.momentum
    for name, layer in _named_norm_layers(model):
        if layer.momentum is None:
            raise ConfigError(
                "batch_norm.momentum",
                f'layer "{name}" has momentum=None, a cumulative average over all updates so far, which no step '
                f"size or resume can leave unchanged; set batch_norm.momentum=0.1, or use batch_norm.recalibrate",
            )
    if section.mode == "frozen":
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                raise ConfigError(
                    "batch_norm.mode",
                    f'layer "{name}" keeps no running statistics (track_running_stats=False), so there are none to '
                    f"freeze; use batch_norm.mode=micro, or let it keep them",
                )
        for layer in norm_layers(model):
            freeze(layer)
    if section.mode == "sync":
        if device.type == "cpu" and ranks > 1:
            raise ConfigError(
                "batch_norm.mode",
                "sync uses torch's SyncBatchNorm, which runs on GPUs only; use batch_norm.mode=micro on the CPU",
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return model


def norm_layers(model: nn.Module) -> list[_NormBase]:
    """The layers of `model` that keep running statistics."""
    return [layer for _, layer in _named_norm_layers(model)]


def freeze(layer: nn.Module) -> None:
    """Fix a norm layer's weights and statistics."""
    layer.requires_grad_(False)
    hold_in_eval(layer)


def hold_in_eval(module: nn.Module) -> None:
    """The module stays in eval mode, with all that it holds, whatever `train()` is called above it."""
    module.eval()
    module.train = MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]


def is_held(module: nn.Module) -> bool:
    return "train" in vars(module)


def release(module: nn.Module) -> None:
    """Undo `hold_in_eval`: the next `train()` reaches the module again."""
    del module.train


def _named_norm_layers(model: nn.Module) -> list[tuple[str, _NormBase]]:
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, _NormBase) and layer.running_mean is not None
    ]


class RunningStatistics:
    """Keeps a model's running statistics right on every rank: `begin` each step, `gather` before reading them.

    Every layer must be called the same number of times in each micro-batch; how often is seen in the first step.
    """

    def __init__(self, model: nn.Module, section: BatchNormConfig, ranks: Ranks) -> None:
        self._ranks = ranks
        self._layers = [layer for layer in norm_layers(model) if not is_held(layer)]
        self._shared = ranks.count > 1 and section.mode == "micro" and bool(self._layers)
        self._per_step = section.momentum_per == "step"
        self._base = [float(layer.momentum or 0.0) for layer in self._layers]
        self.statistics = [
            t for layer in self._layers for t in (layer.running_mean, layer.running_var) if t is not None
        ]
        self._counters = [n for layer in self._layers if (n := layer.num_batches_tracked) is not None]
        self._at_once = ranks.count if section.mode == "sync" else 1  # micro-batches that make one update
        self._cuts = 0 if self._per_step else 1  # updates over which a momentum is spread
        self._gathered = True  # every rank holds the true statistics, not its share
        self._trailing = 0  # others' micro-batches, after this rank's own, for which its share has not aged yet
        self._first_run: tuple[int, list[int]] | None = None  # the first step: own micro-batches, counters before
        self._calls: list[int] | None = None  # for each layer, its calls in a micro-batch
        self._ages: list[tuple[float, list[Tensor]]] = []  # what one micro-batch leaves, of which statistics

    def release(self) -> None:
        """Give the layers their own momenta back. For what comes after this: parts that are trained from now on."""
        for layer, base in zip(self._layers, self._base, strict=True):
            layer.momentum = base

    def begin(self, step: Step) -> None:
        """Make ready for `step`'s micro-batches: momentum and, on several ranks, this rank's share."""
        self._count_calls()
        if self._per_step and len(step.micro_batches) != self._cuts * self._at_once:
            self._settle()
            self._spread_momentum(len(step.micro_batches) // self._at_once)
        if not self._shared:
            return
        first, last = step.ranks[self._ranks.rank]
        if self._gathered:
            self._scatter()  # the shares of all but rank 0 are empty, and rank 0 runs first: nothing ages yet
        else:
            self._settle(first)
        self._trailing = len(step.micro_batches) - last
        if self._first_run is None and last > first:
            self._first_run = last - first, [int(n) for n in self._counters]

    def gather(self) -> None:
        """Put the true statistics on every rank. A collective; cheap when nothing has changed since the last."""
        if not self._shared or self._gathered:
            return
        self._count_calls()
        self._settle()
        for tensors in (self.statistics, self._counters):
            flat = self._ranks.sum_(torch.cat([t.reshape(-1) for t in tensors]))
            for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))
        self._gathered = True

    def _scatter(self) -> None:
        if not self._ranks.is_main:
            torch._foreach_zero_([*self.statistics, *self._counters])
        self._gathered = False

    def _settle(self, more: int = 0) -> None:
        """Age this rank's share for the others' micro-batches: those still due, and `more`."""
        count, self._trailing = self._trailing + more, 0
        if not self._shared or self._gathered or not count or self._calls is None:
            return  # a rank that has run nothing yet has an empty share
        if not self._ages:
            self._ages = self._group()
        for kept, statistics in self._ages:
            torch._foreach_mul_(statistics, kept**count)

    def _count_calls(self) -> None:
        """After the first step that this rank ran a part of: how often each layer is called in a micro-batch."""
        if self._calls is None and self._first_run is not None:
            own, before = self._first_run
            self._calls = [(int(now) - then) // own for now, then in zip(self._counters, before, strict=True)]

    def _group(self) -> list[tuple[float, list[Tensor]]]:
        """The statistics by what one micro-batch leaves of them, (1 - momentum)^calls."""
        assert self._calls is not None
        groups: dict[float, list[Tensor]] = {}
        for layer, counted in zip(self._layers, self._calls, strict=True):
            calls = counted if isinstance(layer, _BatchNorm) else 1  # instance norms do not count theirs
            kept = (1.0 - (layer.momentum or 0.0)) ** calls
            statistics = (layer.running_mean, layer.running_var)
            groups.setdefault(kept, []).extend(t for t in statistics if t is not None)
        return [(kept, statistics) for kept, statistics in groups.items() if kept != 1.0]

    def _spread_momentum(self, cuts: int) -> None:
        """Spread each momentum over `cuts` updates: 1 - (1 - m)^(1/cuts)."""
        for layer, base in zip(self._layers, self._base, strict=True):
            layer.momentum = 1.0 - (1.0 - base) ** (1.0 / cuts)
        self._cuts = cuts
        self._ages = []
