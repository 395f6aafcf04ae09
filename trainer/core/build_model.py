"""The model and the loss of a run, with their initial weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.components.compiling import compile_model
from trainer.components.dtypes import cast, describe_converted
from trainer.components.lazy import give_lazy_layers_sizes
from trainer.components.models import build_model, input_channels
from trainer.components.refused_models import refuse_untrainable
from trainer.components.task import (
    Task,
    as_task,
)
from trainer.components.weights import start_from_weights, weights_file
from trainer.config.schema import Config
from trainer.core.build_input import RunInput
from trainer.core.first_samples import check_classes
from trainer.errors import ConfigError, listed
from trainer.exact.batch_norm import configure, refuse_cumulative_average
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.seeding import key, preserved_cpu_generators, seed_cpu
from trainer.exact.sharding import refuse_what_cannot_be_cut, shard
from trainer.process.ranks import Ranks
from trainer.storage.signature import (
    describe_other_classes,
)


@dataclass(frozen=True)
class ModelAndTask:
    """What a run trains: the model, in its dtype and place, and the loss, which may have parameters of its own.

    `dtypes_note` says which of the model's tensors had another dtype, and `sharding_note` what no longer sees its
    parameters; "" for nothing.
    """

    module: nn.Module
    task: Task
    weights_note: str
    dtypes_note: str
    sharding_note: str


def build_model_and_task(
    config: Config,
    ranks: Ranks,
    run_input: RunInput,
    model: nn.Module | None,
    task: Task | nn.Module | None,
    *,
    dtype: torch.dtype,
) -> ModelAndTask:
    """Build those of the config, or take over those that were passed. A collective.

    Raises `ConfigError`, also where the data give the loss nothing to learn.
    """
    build = partial(
        _run_model,
        config,
        ranks,
        dtype=dtype,
        model=model,
        inputs=run_input.first,
        num_classes=run_input.num_classes,
        classes=run_input.data.classes,
    )
    # A machine may lack the file of the weights.
    module, weights_note, dtypes_note = ranks.on_each(build)
    the_task = _run_task(config, task, run_input.num_classes, module, dtype)
    cast(the_task, dtype, ranks.device)
    sharding_note = _share_out(config, ranks, module, the_task)
    check_classes(the_task, run_input.num_classes, run_input.data)
    return ModelAndTask(module, the_task, weights_note, dtypes_note, sharding_note)


def _run_model(
    config: Config,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    model: nn.Module | None,
    inputs: Any,
    num_classes: int | None,
    classes: list[str] | None,
) -> tuple[nn.Module, str, str]:
    """The model with its initial weights, on its device and in its dtype; notes on the weights and on other dtypes."""
    weights = weights_file(config.model, ranks.main_first)
    if model is None:
        model = build_model(
            config.model,
            seed=config.run.seed,
            num_classes=num_classes,
            in_channels=input_channels(inputs),
        )
    give_lazy_layers_sizes(model, inputs, config.run.seed)
    refuse_untrainable(model, "model.name", dtype)
    weights_note = start_from_weights(
        weights, model, config.model, num_classes, config.run.seed
    )
    if weights is not None:
        weights_note += describe_other_classes(weights, classes)
    model = configure(model, config.batch_norm, ranks=ranks.count, device=ranks.device)
    dtypes_note = describe_converted(model, dtype)
    if is_sharded(config, ranks):
        cast(model, dtype)  # the whole of it may not fit on the device
    else:
        cast(model, dtype, ranks.device)
    # What a backward of the caller's own has left would be part of the first step.
    model.zero_grad()
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.train.compile:
        compile_model(
            model,
            config.train.compile,
            bitwise=config.run.reproducibility == "bitwise",
            device=ranks.device,
        )
    return model, weights_note, dtypes_note


def is_sharded(config: Config, ranks: Ranks) -> bool:
    """True for a run in which each process holds a part of the parameters."""
    return config.train.parallel == "fsdp" and ranks.count > 1


def _check_can_be_sharded(module: nn.Module, task: Task) -> None:
    """Raise `ConfigError` for a model or a loss that `train.parallel=fsdp` cannot train, on one process as on many."""
    if task.whole_step:
        raise ConfigError(
            "train.parallel",
            "fsdp cannot be combined with a loss of the whole step (whole_step), whose two passes run other numbers of "
            "forwards on each process; use ddp",
        )
    if ModelAndLoss(module, task).trained_loss_parameters():
        raise ConfigError(
            "train.parallel",
            "fsdp shares out the model's parameters, and the loss has some of its own; make them the model's, or use "
            "ddp",
        )
    refuse_what_cannot_be_cut(module)


def _run_task(
    config: Config,
    task: Task | nn.Module | None,
    num_classes: int | None,
    module: nn.Module,
    dtype: torch.dtype,
) -> Task:
    """The loss and its metrics. Weights of its own are a function of `run.seed`, or those that it comes with.

    A part of it in eval mode is a fixed one, such as the network of a perceptual loss: its parameters are not trained.
    """
    if task is None:
        # The caller's own draws go on as if nothing had been built.
        with preserved_cpu_generators():
            seed_cpu(key(config.run.seed, "loss"))
            the_task = as_task(config.loss, num_classes)
    else:
        the_task = as_task(task, num_classes)
    refuse_untrainable(the_task, "loss.name", dtype)
    the_task.zero_grad()
    for name, part in ModelAndLoss(module, the_task).named_loss_modules():
        if isinstance(part, _NormBase) and part.training:
            refuse_cumulative_average(name, part)
        if not part.training:
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(False)
    return the_task


def _share_out(config: Config, ranks: Ranks, module: nn.Module, task: Task) -> str:
    """Let each rank hold a part of the parameters, with `train.parallel=fsdp`. A collective.

    Returns a line on what no longer sees the model's parameters, "" if there is nothing.
    """
    if config.train.parallel == "fsdp":
        ranks.on_each(partial(_check_can_be_sharded, module, task))
    if not is_sharded(config, ranks):
        return ""
    held = shard(module, ranks)
    if not held:
        return ""
    return (
        f"train.parallel=fsdp has put parts in the place of parameters that code outside the model still holds "
        f"({listed(held, 3)}): what is computed with those has no effect on training; read them from the model"
    )
