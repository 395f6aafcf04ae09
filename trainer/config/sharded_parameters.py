"""Values of other keys that `train.parallel=fsdp` needs.

They are asked for on one process, too: a config is written for any number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from trainer.errors import ConfigError


class Need(NamedTuple):
    """The values of a key that can be combined with fsdp, and why no others can."""

    key: str
    values: tuple[object, ...]
    reason: str


NEEDS = (
    Need(
        "run.reproducibility",
        ("standard",),
        "bitwise sums gradients by a fixed tree, and fsdp by one that depends on the number of processes; use "
        "standard, or train.parallel=ddp",
    ),
    Need(
        "run.proof",
        ("on", "off"),
        "strict tries micro-batches on each process by itself, and fsdp gathers parameters from all of them in every "
        "forward; use on, and try the run once with train.parallel=ddp",
    ),
    Need(
        "train.precision",
        ("fp32", "bf16", "fp64"),
        "fp16 scales the loss by whether the whole gradient overflowed, which no process sees; use bf16",
    ),
    Need(
        "train.compile",
        (False,),
        "fsdp gathers parameters between the layers, and a compiled model is one piece; use false",
    ),
    Need(
        "train.channels_last",
        (False,),
        "fsdp cuts parameters that are stored row by row; use false",
    ),
    Need(
        "train.find_unused_parameters",
        (False,),
        "a parameter that no process uses would have a gradient of zero, where other runs have none; let every "
        "parameter take part, or freeze it",
    ),
    Need("batch_norm.mode", ("micro", "frozen"), "sync was not tried; use micro"),
    Need(
        "model.unfreeze",
        ({},),
        "which parameters are trained is settled before the first forward; use model.freeze for the whole run",
    ),
    Need(
        "data.bad_samples",
        ("stop",),
        "quarantine may leave a process fewer micro-batches than the plan says, and all must know their number; use "
        "stop",
    ),
    Need(
        "wandb.log_histograms_every",
        (None,),
        "histograms are of whole parameters; use null",
    ),
)


def check_needs_of_shards(value_of: Callable[[str], object]) -> None:
    """Raise `ConfigError` for the first key that has another value. `value_of` gives the value of a dotted key."""
    for need in NEEDS:
        value = value_of(need.key)
        if value not in need.values:
            raise ConfigError(
                need.key,
                f"{value} cannot be combined with train.parallel=fsdp: {need.reason}",
            )
    name = str(value_of("optimizer.name"))
    if name.rpartition(".")[2] == "Muon":
        raise ConfigError(
            "optimizer.name",
            f"{name} cannot be combined with train.parallel=fsdp: it multiplies whole matrices in bf16, and rounds "
            f"otherwise where they are in parts; use an optimizer that works element by element, or "
            f"train.parallel=ddp",
        )
