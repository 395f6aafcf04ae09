"""A sampler of the user's own: a pure function of labels, seed and epoch that gives sample ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from trainer.config.registry import build
from trainer.data.sampler import KEY, DrawnOrder, SamplerSource, check_ids
from trainer.errors import ConfigError
from trainer.exact.plan import Ids
from trainer.exact.seeding import preserved_cpu_generators


class FunctionOrder(DrawnOrder):
    """The order that `function` gives, which must be pure and give as many ids in every epoch.

    It takes any of `labels` (class ids, int64 `(samples,)`, read-only), `samples` (their number), `seed` (`run.seed`)
    and `epoch` (from 0 on) by name, and the other keys of `data.sampler`. Raises `ConfigError` for a function that is
    not pure or gives no sample ids.
    """

    is_own_code = True

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        source: SamplerSource,
    ) -> None:
        self._name = name
        self._function = function
        self._arguments = arguments
        self._facts: dict[str, Any] = {"seed": source.seed, "samples": source.samples}
        # Where they are not known, only a function that asks for them is refused.
        if "labels" in _parameters(function):
            self._facts["labels"] = source.labels
        count = len(self._ids_of(0))
        super().__init__(
            count, self._ids_as_many_as_ever, f"{name} · {count:,} samples an epoch"
        )

    def _ids_as_many_as_ever(self, epoch: int) -> Ids:
        ids = self._ids_of(epoch)
        if len(ids) != self.samples:
            raise ConfigError(
                f"{KEY}.name",
                f"{self._name} gives {len(ids):,} samples for epoch {epoch}, and {self.samples:,} for epoch 0; every "
                f"epoch has as many steps, so give as many in each",
            )
        return ids

    def _ids_of(self, epoch: int) -> Ids:
        # What it draws from the global generators must change nothing else in the run.
        with preserved_cpu_generators():
            ids = self._call(epoch)
            again = self._call(epoch)
        if not np.array_equal(ids, again):
            raise ConfigError(
                f"{KEY}.name",
                f"{self._name} gives other ids when it is called again for epoch {epoch}; let them depend on its "
                f"arguments alone, as numpy.random.default_rng([seed, epoch]) does",
            )
        return ids

    def _call(self, epoch: int) -> Ids:
        facts = {**self._facts, "epoch": epoch}
        values = build(KEY, self._function, self._arguments, **facts)
        subject = f"{self._name} gives, for epoch {epoch},"
        return check_ids(f"{KEY}.name", subject, values, facts["samples"])


def _parameters(function: Callable[..., Any]) -> set[str]:
    with suppress(TypeError, ValueError):  # some built-in callables have no signature
        return set(inspect.signature(function).parameters)
    return set()
