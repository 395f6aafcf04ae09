"""Several micro-batches in one forward, each computed as if it were alone.

Almost every operation of a model acts on each sample by itself, and gains from more of them at once. Two kinds do
not, and are run micro-batch by micro-batch while `Fused` is active: normalisation over a batch, by each
micro-batch's own statistics, and dropout, from each micro-batch's own random stream. Both are intercepted at the
functions of torch, which modules and functional code have in common (`torch.overrides.TorchFunctionMode`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from trainer.errors import ConfigError
from trainer.exact.model_and_loss import ModelAndLoss

DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    F.rrelu,
)
REMEDY = "set batch.fuse=1"
Part = TypeVar("Part")


@dataclass
class StatisticUpdates:
    """A running statistic, and the micro-batches' own values of it, `(micro-batches, features)` for each call."""

    running: Tensor
    momentum: float
    calls: list[Tensor] = field(default_factory=list)

    def apply(self, count: int) -> None:
        """Update the running statistic as `count` micro-batches would, one after the other."""
        calls = len(self.calls)
        decay = (1.0 - self.momentum) ** (count * calls)
        for call, values in enumerate(self.calls):
            weights = _weights(
                self.momentum,
                count,
                calls,
                call,
                dtype=self.running.dtype,
                device=self.running.device,
            )
            # What was there before decays once, for all calls.
            self.running.addmv_(values.t(), weights, beta=decay if call == 0 else 1.0)


class Fused(TorchFunctionMode):
    """The forward of as many micro-batches as there are `seeds`, `samples` in all; call `finish` after it.

    Each micro-batch draws from `generator` as if it had been seeded for it alone.
    """

    def __init__(
        self,
        model: nn.Module,
        generator: torch.Generator,
        seeds: Sequence[int],
        samples: int,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._whole = ModelAndLoss(model, loss)
        self._generator = generator
        self._seeds = seeds
        self._count = len(seeds)
        self._samples = samples
        # Something was drawn for several micro-batches at once.
        self._has_foreign_draws = False
        # The generator's state for each micro-batch, once one has drawn.
        self._states: list[Tensor] = []
        # By the id of the running statistic.
        self._updates: dict[int, StatisticUpdates] = {}
        generator.manual_seed(seeds[0])
        self._initial_state = generator.get_state()
        # On a GPU a draw on the host belongs to no micro-batch either.
        self._host_state = (
            torch.default_generator.get_state()
            if generator is not torch.default_generator
            else None
        )

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = HANDLERS.get(function)
        if handler is None:
            return function(*args, **(kwargs or {}))
        return handler(self, function, *args, **(kwargs or {}))

    def finish(self) -> None:
        """Leave the running statistics as the micro-batches would, one after the other.

        Raises `ConfigError` if something was drawn for several micro-batches at once. Never waits for a GPU.
        """
        self._check_draws()
        if self._has_foreign_draws:
            raise ConfigError(
                "batch.fuse",
                "the model or the loss draws random numbers for several micro-batches at once; draw them by "
                f"dropout, torch.rand or torch.randn with the samples as first dimension, or {REMEDY}",
            )
        if not self._updates:
            return
        with torch.no_grad():
            for updates in self._updates.values():
                updates.apply(self._count)
            self._update_counters()

    def _update_counters(self) -> None:
        for _, layer in self._whole.named_norm_layers():
            updates = self._updates.get(id(layer.running_mean))
            if (
                updates is None
                or layer.num_batches_tracked is None
                or not isinstance(layer, _BatchNorm)
            ):
                continue
            # Each call has counted one micro-batch itself.
            layer.num_batches_tracked.add_((self._count - 1) * len(updates.calls))

    def parts(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """`x` by micro-batch; None if its first dimension is not that of the samples."""
        if x.dim() == 0 or x.shape[0] % self._samples:
            return None
        return x.chunk(self._count)

    def rows(self, shape: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        """A shape by micro-batch; None if its first dimension is not that of the samples."""
        if not shape or not shape[0] or shape[0] % self._samples:
            return None
        rows = shape[0] // self._count
        return [(rows, *shape[1:])] * self._count

    def draw(
        self, parts: Sequence[Part], function: Callable[[Part], Tensor]
    ) -> list[Tensor]:
        """`function` of each part, drawing from where its micro-batch's random stream has got to."""
        self._check_draws()
        if not self._states:
            for seed in self._seeds:
                self._generator.manual_seed(seed)
                self._states.append(self._generator.get_state())
        results = []
        for index, part in enumerate(parts):
            self._generator.set_state(self._states[index])
            results.append(function(part))
            self._states[index] = self._generator.get_state()
        # Where it was, by which `_check_draws` sees whether anything else draws.
        self._generator.set_state(self._initial_state)
        return results

    def _check_draws(self) -> None:
        """Note if anything was drawn outside `draw`: only that can have moved the generator."""
        is_unmoved = torch.equal(self._generator.get_state(), self._initial_state)
        if self._host_state is not None:
            is_unmoved = is_unmoved and torch.equal(
                torch.default_generator.get_state(), self._host_state
            )
        self._has_foreign_draws |= not is_unmoved

    def own_statistics(self, running: Tensor | None, momentum: float) -> Tensor | None:
        """Where a call writes the micro-batches' own statistics instead of to `running`, `(micro-batches, features)`.

        None if the layer keeps no running statistics.
        """
        if running is None:
            return None
        updates = self._updates.get(id(running))
        if updates is None:
            updates = self._updates[id(running)] = StatisticUpdates(running, momentum)
        values = running.new_zeros(self._count, running.shape[0])
        updates.calls.append(values)
        return values


@lru_cache(maxsize=256)
def _weights(
    momentum: float,
    count: int,
    calls: int,
    call: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The weight of each micro-batch's value in a running statistic after all updates, `(count,)`.

    The micro-batches come one after the other, `calls` updates in each, of which this is number `call`.
    """
    last_update = count * calls - 1
    values = []
    for index in range(count):
        later_updates = last_update - (index * calls + call)
        values.append(momentum * (1.0 - momentum) ** later_updates)
    return torch.tensor(values, dtype=dtype, device=device)


# ---------------------------------------------------------------- replacements of torch's functions


def _dropout(fused: Fused, function: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """Dropout and its like, `function(x, p, training, inplace)`."""
    parts = fused.parts(x) if kwargs["training"] else None
    if parts is None:
        return function(x, **kwargs)  # type: ignore[no-any-return]
    kwargs["inplace"] = False  # a part is a view, which autograd forbids to overwrite
    return torch.cat(fused.draw(parts, lambda part: function(part, **kwargs)))


def _random_like(fused: Fused, function: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """Noise in the shape of the samples."""
    parts = fused.parts(x) if "generator" not in kwargs else None
    if parts is None:
        return function(x, **kwargs)  # type: ignore[no-any-return]
    return torch.cat(fused.draw(parts, lambda part: function(part, **kwargs)))


def _random_of_size(fused: Fused, function: Any, *size: Any, **kwargs: Any) -> Tensor:
    """Noise with a row for each sample, such as the mask of a drop-connect."""
    if len(size) == 1 and not isinstance(size[0], int):
        size = size[0]  # torch.rand((2, 3)) is torch.rand(2, 3)
    size = kwargs.pop("size", size)
    rows = fused.rows(tuple(size)) if "generator" not in kwargs else None
    if rows is None:
        return function(size, **kwargs)  # type: ignore[no-any-return]
    return torch.cat(fused.draw(rows, lambda shape: function(shape, **kwargs)))


def _bernoulli_(
    fused: Fused, function: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A mask drawn by hand, as stochastic depth draws its own."""
    parts = fused.parts(x) if "generator" not in kwargs else None
    if parts is None:
        return function(x, *args, **kwargs)  # type: ignore[no-any-return]
    fused.draw(parts, lambda part: function(part, *args, **kwargs))
    return x


def _batch_norm(
    fused: Fused,
    function: Any,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(
            x, running_mean, running_var, weight, bias, False, momentum, eps
        )
    parts = fused.parts(x)
    if parts is None:
        raise ConfigError(
            "batch.fuse",
            f"a BatchNorm layer's input of shape {tuple(x.shape)} does not have the samples as its "
            f"first dimension, so it cannot be split into micro-batches; {REMEDY}",
        )
    mean = fused.own_statistics(running_mean, momentum)
    var = fused.own_statistics(running_var, momentum)
    normalize = (
        _normalize_one_by_one if x.device.type == "cpu" else _normalize_as_channels
    )
    return normalize(parts, mean=mean, var=var, weight=weight, bias=bias, eps=eps)


def _normalize_one_by_one(
    parts: Sequence[Tensor],
    *,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Each micro-batch by a call of its own: the least memory traffic."""
    results = []
    for index, part in enumerate(parts):
        # With a momentum of 1, these are left with the micro-batch's own statistics.
        own_mean = None if mean is None else mean[index]
        own_var = None if var is None else var[index]
        results.append(
            F.batch_norm(part, own_mean, own_var, weight, bias, True, 1.0, eps)
        )
    return torch.cat(results)


def _normalize_as_channels(
    parts: Sequence[Tensor],
    *,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """All micro-batches by one call, side by side as channels: the fewest launches."""
    count = len(parts)
    out = F.batch_norm(
        torch.cat(tuple(parts), 1),
        None if mean is None else mean.view(-1),
        None if var is None else var.view(-1),
        None if weight is None else weight.repeat(count),
        None if bias is None else bias.repeat(count),
        True,
        1.0,
        eps,
    )
    return torch.cat(out.chunk(count, 1))


def _instance_norm(
    fused: Fused,
    function: Any,
    x: Tensor,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Every sample is normalised by itself in any case; only the running statistics depend on micro-batches."""
    parts = fused.parts(x) if use_input_stats else None
    if parts is None or running_mean is None or running_var is None:
        return F.instance_norm(
            x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    means = fused.own_statistics(running_mean, momentum)
    variances = fused.own_statistics(running_var, momentum)
    assert means is not None
    assert variances is not None
    results = []
    for part, mean, var in zip(parts, means, variances, strict=True):
        results.append(F.instance_norm(part, mean, var, weight, bias, True, 1.0, eps))
    return torch.cat(results)


HANDLERS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys(DROPOUTS, _dropout),
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.bernoulli), _random_like),
    **dict.fromkeys((torch.rand, torch.randn), _random_of_size),
    Tensor.bernoulli_: _bernoulli_,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
