"""One norm layer of a model: its running statistics, its momentum, and how often a micro-batch updates them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from trainer.errors import ConfigError


class NormLayer:
    """A norm layer with running statistics.

    Attributes: `name`; `buffers`, mean and variance; `counter` of calls; `calls`, its calls in training mode in one
    micro-batch, 0 until it is seen to train.
    """

    def __init__(self, name: str, module: _NormBase) -> None:
        assert module.running_mean is not None
        assert module.running_var is not None
        if module.num_batches_tracked is None:
            # torch allows it, and then nothing tells how often the layer is called.
            raise ConfigError(
                "model",
                f'norm layer "{name}" keeps running statistics and has no counter num_batches_tracked; set it to '
                f"torch.tensor(0)",
            )
        self.name = name
        self.module = module
        self.buffers = [module.running_mean, module.running_var]
        self.counter = module.num_batches_tracked
        self.calls = 0
        # Instance norms have a counter and do not use it.
        self.counts_calls = isinstance(module, _BatchNorm)
        # torch's kernels write BatchNorm's statistics without a new version; the counter always gets one.
        self._watched = self.counter if self.counts_calls else self.buffers[0]
        self._configured_momentum = float(module.momentum or 0.0)

    @property
    def is_training(self) -> bool:
        return self.module.training

    @property
    def version(self) -> int:
        """A number that grows with every call in training mode, known without asking the device."""
        return self._watched._version

    def refuse_replaced_buffers(self) -> None:
        """Raise `ConfigError` if a forward has put another tensor in the place of a running statistic."""
        module = self.module
        present = (module.running_mean, module.running_var, module.num_batches_tracked)
        for mine, other in zip([*self.buffers, self.counter], present, strict=True):
            if mine is not other:
                raise ConfigError(
                    "model",
                    f'norm layer "{self.name}" replaces its running statistics in forward; update them in place, '
                    f"as by `self.running_mean.copy_(…)`",
                )

    def restore_momentum(self) -> None:
        """Update by the momentum that the layer was built with."""
        self.module.momentum = self._configured_momentum

    def spread_momentum(self, updates: int) -> None:
        """Make n updates together age the statistics as one would: each with momentum 1 - (1 - m)^(1/n)."""
        self.module.momentum = 1.0 - (1.0 - self._configured_momentum) ** (
            1.0 / updates
        )

    def decay(self) -> float:
        """What one micro-batch leaves of the statistics before it: (1 - momentum)^calls."""
        return (1.0 - (self.module.momentum or 0.0)) ** self.calls

    def count_calls(self, counter_before: Tensor, moves: int, count: int) -> int:
        """The calls in one micro-batch, from `count` of them whose forwards moved the version by `moves` each.

        Waits for the device: a compiled layer may count two calls in one go, so the counter itself is read.
        """
        if not self.counts_calls:
            return moves
        # At least one: the layer's version says that it was called.
        return max(1, int(self.counter - counter_before) // count)


def refuse_shared_statistics(layers: Sequence[NormLayer]) -> None:
    """Raise `ConfigError` if two layers hold the same running statistics, which both would be given back."""
    owners: dict[int, str] = {}
    for layer in layers:
        for tensor in (*layer.buffers, layer.counter):
            owner = owners.setdefault(id(tensor), layer.name)
            if owner != layer.name:
                raise ConfigError(
                    "model",
                    f'norm layers "{owner}" and "{layer.name}" share their running statistics, which are counted layer '
                    f"by layer; use one layer in both places, or give each its own",
                )


class CallWatch:
    """Checks that every micro-batch calls each layer as often as the first one did, by versions alone.

    A forward of several micro-batches at once (`batch.fuse`) moves versions in another way than that of one.
    """

    def __init__(self, layers: list[NormLayer]) -> None:
        self._layers = layers
        self._before: list[int] | None = None
        self._is_fused = False
        self._expected: dict[bool, list[int]] = {}

    def forget(self) -> None:
        """Expect nothing: the layers' modes have changed."""
        self._before = None
        self._expected = {}

    def begin(self, *, is_fused: bool) -> None:
        """Before a forward."""
        self._is_fused = is_fused
        self._before = [layer.version for layer in self._layers]

    def end(self) -> str | None:
        """After the forward and its backward: the name of a layer that was called more or less often, else None."""
        if self._before is None:
            return None
        moves = []
        for layer, before in zip(self._layers, self._before, strict=True):
            moves.append(layer.version - before)
        self._before = None
        expected = self._expected.get(self._is_fused)
        if moves == expected:
            return None
        if expected is not None:
            return self._first_different(moves, expected)
        self._expected[self._is_fused] = moves
        other = self._expected.get(not self._is_fused)
        if other is None:
            return None
        return self._first_different(list(map(bool, moves)), list(map(bool, other)))

    def moves(self) -> list[int]:
        """How far one forward has moved each layer's version; zeros before any."""
        for is_fused in (False, True):
            if is_fused in self._expected:
                return self._expected[is_fused]
        return [0] * len(self._layers)

    def _first_different(self, moves: list[int], others: list[int]) -> str | None:
        for layer, here, there in zip(self._layers, moves, others, strict=True):
            if here != there:
                return layer.name
        return None


class EvalCalls:
    """Notes which layers are called in eval mode, by hooks that are there for one step."""

    def __init__(self, layers: list[NormLayer]) -> None:
        self._names: set[str] = set()
        self._handles = [
            layer.module.register_forward_pre_hook(self._hook(layer.name))
            for layer in layers
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, inputs: Any) -> None:
            if not module.training:
                self._names.add(name)

        return note

    def end(self) -> set[str]:
        """The names of the layers; removes the hooks."""
        for handle in self._handles:
            handle.remove()
        return self._names
