"""Several micro-batches in one forward, each as if it were alone.

Almost every operation of a model acts on each sample by itself, and gains from more of them at once. Two kinds do
not, and are run micro-batch by micro-batch while `Fused` is active: normalisation over a batch, by each
micro-batch's own statistics, and dropout, from each micro-batch's own random stream. Both are caught where
modules and functions alike come through, at the functions of torch (`torch.overrides.TorchFunctionMode`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from trainer.errors import ConfigError
from trainer.exact.batch_norm import norm_layers

RANDOM = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu)
REMEDY = "set batch.fuse=1"
Part = TypeVar("Part")


class Fused(TorchFunctionMode):
    """The forward of as many micro-batches as there are `seeds`, `samples` in all; call `finish` when it is done.

    Each micro-batch draws from `generator` as if it had been seeded for it alone.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator, seeds: Sequence[int], samples: int) -> None:
        super().__init__()
        self._model = model
        self._generator = generator
        self._seeds = seeds
        self._count = len(seeds)
        self._samples = samples
        self._strayed = False  # something was drawn that belongs to no micro-batch
        self._states: list[Tensor] = []  # of each micro-batch's stream, once one has drawn
        # For each running statistic its momentum and, call by call, what the micro-batches hold: (count, features).
        self._seen: dict[int, tuple[Tensor, float, list[Tensor]]] = {}
        generator.manual_seed(seeds[0])
        self._untouched = generator.get_state()
        # On a GPU, what is drawn on the host belongs to no micro-batch. A copy: the state itself is 5 KB.
        self._host_state = torch.default_generator.get_state() if generator is not torch.default_generator else None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = HANDLERS.get(function)
        if handler is None:
            return function(*args, **(kwargs or {}))
        return handler(self, function, *args, **(kwargs or {}))

    def finish(self) -> None:
        """Leave the running statistics as the micro-batches would, one after the other.

        Raises a `ConfigError` if something was drawn that belongs to no micro-batch. Nothing waits for the device.
        """
        self._look_for_strays()
        if self._strayed:
            raise ConfigError(
                "batch.fuse",
                "the model or the loss draws random numbers for several micro-batches at once; draw them by "
                f"dropout, torch.rand or torch.randn with the samples as first dimension, or {REMEDY}",
            )
        with torch.no_grad():
            for running, momentum, calls in self._seen.values():
                for call, values in enumerate(calls):
                    place = self._count, len(calls), call
                    weights = _weights(momentum, *place, dtype=running.dtype, device=running.device)
                    kept = (1.0 - momentum) ** (self._count * len(calls)) if call == 0 else 1.0
                    running.addmv_(values.t(), weights, beta=kept)
            for layer in norm_layers(self._model) if self._seen else []:
                seen, counter = self._seen.get(id(layer.running_mean)), layer.num_batches_tracked
                if seen is not None and counter is not None and isinstance(layer, _BatchNorm):
                    counter.add_((self._count - 1) * len(seen[2]))  # each call has counted one itself

    def parts(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """`x` by micro-batch; None where its first dimension is not that of the samples."""
        if x.dim() == 0 or x.shape[0] % self._samples:
            return None
        return x.chunk(self._count)

    def rows(self, shape: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        """A shape by micro-batch; None where its first dimension is not that of the samples."""
        if not shape or not shape[0] or shape[0] % self._samples:
            return None
        return [(shape[0] // self._count, *shape[1:])] * self._count

    def draw(self, parts: Sequence[Part], function: Callable[[Part], Tensor]) -> list[Tensor]:
        """`function` of each part, each drawing on from where its micro-batch's stream is."""
        self._look_for_strays()
        if not self._states:
            for seed in self._seeds:
                self._generator.manual_seed(seed)
                self._states.append(self._generator.get_state())
        results = []
        for i, part in enumerate(parts):
            self._generator.set_state(self._states[i])
            results.append(function(part))
            self._states[i] = self._generator.get_state()
        self._generator.set_state(self._untouched)
        return results

    def _look_for_strays(self) -> None:
        self._strayed |= not torch.equal(self._generator.get_state(), self._untouched)
        if self._host_state is not None:
            self._strayed |= not torch.equal(torch.default_generator.get_state(), self._host_state)

    def scratch(self, running: Tensor | None, momentum: float) -> Tensor | None:
        """Where a normalisation puts what its micro-batches hold, `(count, features)`, instead of in `running`."""
        if running is None:
            return None
        scratch = running.new_zeros(self._count, running.shape[0])
        self._seen.setdefault(id(running), (running, momentum, []))[2].append(scratch)
        return scratch


@lru_cache(maxsize=256)
def _weights(momentum: float, count: int, calls: int, call: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each micro-batch's value counts after all updates, one micro-batch after the other, `calls` in each."""
    last = count * calls - 1
    values = [momentum * (1.0 - momentum) ** (last - i * calls - call) for i in range(count)]
    return torch.tensor(values, dtype=dtype, device=device)


# ---------------------------------------------------------------- what takes the place of torch's functions


def _random(fused: Fused, function: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """Dropout and its like, `function(x, p, training, inplace)`."""
    parts = fused.parts(x) if kwargs["training"] else None
    if parts is None:
        return function(x, **kwargs)  # type: ignore[no-any-return]
    kwargs["inplace"] = False  # a part is a view, which autograd does not let be overwritten
    return torch.cat(fused.draw(parts, lambda part: function(part, **kwargs)))


def _like(fused: Fused, function: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """Noise in the shape of the samples."""
    parts = fused.parts(x) if "generator" not in kwargs else None
    if parts is None:
        return function(x, **kwargs)  # type: ignore[no-any-return]
    return torch.cat(fused.draw(parts, lambda part: function(part, **kwargs)))


def _sized(fused: Fused, function: Any, *size: Any, **kwargs: Any) -> Tensor:
    """Noise of which each sample has a row, such as the mask of a drop-connect."""
    given = kwargs.pop("size", size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
    rows = fused.rows(tuple(given)) if "generator" not in kwargs else None
    if rows is None:
        return function(given, **kwargs)  # type: ignore[no-any-return]
    return torch.cat(fused.draw(rows, lambda shape: function(shape, **kwargs)))


def _bernoulli_(fused: Fused, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    parts = fused.parts(x)
    if parts is None:
        raise ConfigError(
            "batch.fuse",
            f"a BatchNorm layer's input of shape {tuple(x.shape)} does not have the samples as its "
            f"first dimension, so it cannot be taken apart into micro-batches; {REMEDY}",
        )
    mean, var = fused.scratch(running_mean, momentum), fused.scratch(running_var, momentum)
    normalize = _one_by_one if x.device.type == "cpu" else _as_channels
    return normalize(parts, mean=mean, var=var, weight=weight, bias=bias, eps=eps)


def _one_by_one(
    parts: Sequence[Tensor],
    *,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Each micro-batch by a call of its own: the least memory traffic."""
    means = mean if mean is not None else [None] * len(parts)
    variances = var if var is not None else [None] * len(parts)
    return torch.cat(
        [F.batch_norm(x, m, v, weight, bias, True, 1.0, eps) for x, m, v in zip(parts, means, variances, strict=True)]
    )


def _as_channels(
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
    """Normalised sample by sample in any case; only its running statistics know of micro-batches."""
    parts = fused.parts(x) if use_input_stats and running_mean is not None else None
    mean, var = (None, None) if parts is None else (fused.scratch(s, momentum) for s in (running_mean, running_var))
    if parts is None or mean is None or var is None:
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return torch.cat(
        [F.instance_norm(p, m, v, weight, bias, True, 1.0, eps) for p, m, v in zip(parts, mean, var, strict=True)]
    )


HANDLERS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys(RANDOM, _random),
    Tensor.bernoulli_: _bernoulli_,
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.bernoulli), _like),
    **dict.fromkeys((torch.rand, torch.randn), _sized),
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
