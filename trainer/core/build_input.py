"""What a run is trained and evaluated on: its data, who runs what of it, and the loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trainer.config.schema import Config
from trainer.core.build_data import count_classes, with_notes
from trainer.core.build_loaders import Loaders, check_first_batches, run_loaders
from trainer.core.first_samples import first_inputs
from trainer.core.preflight import check_data, check_order
from trainer.data.classes import with_classes
from trainer.data.datasets import Datasets
from trainer.data.evaluation_loaders import loader_as_files
from trainer.data.samplers import build_order
from trainer.exact.plan import Plan
from trainer.process.ranks import Ranks
from trainer.storage.signature import Signature, signature_of_samples


@dataclass(frozen=True)
class RunInput:
    """`first` is the first training input as the model sees it, as a batch of one.

    `num_classes` is the number of the model's outputs, None where it is not known; `device_note` says what lies on the
    device, "" for nothing.
    """

    data: Datasets
    plan: Plan
    loaders: Loaders
    first: Any
    num_classes: int | None
    device_note: str
    signature: Signature


def build_input(
    config: Config,
    ranks: Ranks,
    build_data: Callable[[], Datasets],
    *,
    classes: Sequence[str] | None,
    dtype: torch.dtype,
) -> RunInput:
    """Build the data, and look at the first of them: what cannot be trained on is said before there is a model.

    With `classes`, those that a model was trained on, the data's class ids become the model's, matched by name.
    A collective. Raises `ConfigError` or `DataError`.
    """
    data = ranks.on_each(build_data)
    if classes is not None:
        data = with_classes(data, classes)
    data = with_notes(config, data)
    check_data(data, ranks)
    plan = _plan(config, ranks, data)
    loaders = run_loaders(config, ranks, data, plan, dtype)
    first = ranks.on_each(partial(first_inputs, loaders.train, loaders.evaluated))
    device_note = check_first_batches(ranks, loaders)
    num_classes = count_classes(config, data)
    return RunInput(
        data=data,
        plan=plan,
        loaders=loaders,
        first=first,
        num_classes=num_classes,
        device_note=device_note,
        signature=_signature(config, data, loaders, num_classes),
    )


def _plan(config: Config, ranks: Ranks, data: Datasets) -> Plan:
    # A machine may lack a file that a sampler reads.
    order = ranks.on_each(lambda: build_order(config.data, data, seed=config.run.seed))
    plan = Plan(
        samples=len(data.train) if order is None else order.samples,
        batch_size=config.batch.size,
        micro_size=config.batch.micro_size or config.batch.size,
        ranks=ranks.count,
        epochs=config.train.epochs,
        seed=config.run.seed,
        max_steps=config.train.max_steps,
        equal_ranks=config.batch_norm.mode == "sync",
        order=order,
    )
    check_order(plan, ranks, epoch=0)
    return plan


def _signature(
    config: Config, data: Datasets, loaders: Loaders, num_classes: int | None
) -> Signature:
    loader = loader_as_files(config.data, loaders.evaluated) or loaders.train
    return signature_of_samples(loader, num_classes=num_classes, classes=data.classes)
