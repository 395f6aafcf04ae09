"""The loaders of a run's sets, and what is looked at before anything is built for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from trainer.config.schema import Config
from trainer.core.device_sets import check_first_batch
from trainer.data.datasets import Datasets
from trainer.data.evaluation_loaders import evaluation_loaders
from trainer.data.loading import Loader, build_loaders
from trainer.exact.plan import Plan
from trainer.process.ranks import Ranks


@dataclass(frozen=True)
class Loaders:
    """`evaluated` are those of the validation and the test sets, by phase.

    `measured` gives the targets that metrics are built for; None where nothing is evaluated.
    """

    train: Loader
    evaluated: dict[str, Loader]
    measured: Loader | None


def run_loaders(
    config: Config, ranks: Ranks, data: Datasets, plan: Plan, dtype: torch.dtype
) -> Loaders:
    """The loaders of all sets. Raises `ConfigError` for transforms or a `data.collate` that cannot be built."""
    seed = config.run.seed
    section = config.data
    train, val = build_loaders(
        section, data, seed=seed, device=ranks.device, dtype=dtype
    )
    evaluated = evaluation_loaders(
        section, data, val, seed=seed, device=ranks.device, dtype=dtype
    )
    if plan.order is not None:
        # Sample 0 may be one that it leaves out, because it is damaged.
        train.first_id = int(plan.permutation(0)[0])
    return Loaders(train, evaluated, measured=val or evaluated.get("test"))


def check_first_batches(ranks: Ranks, loaders: Loaders) -> str:
    """What lies on the device, for the header. A collective. Raises as `check_first_batch`."""
    processes_here = ranks.machines.count(ranks.machines[ranks.rank])
    # A machine may have less memory.
    return ranks.on_each(
        partial(check_first_batch, loaders.train, loaders.evaluated, processes_here)
    )
