"""DDP's reduction, completed on a rank whose last micro-batch left some parameters out.

DDP starts to reduce a bucket when the gradients of all its parameters are there. Where one of them is not used, the
bucket is never sent and all other ranks wait for it. Its own remedy, `find_unused_parameters`, searches the graph in
every step, sends one more message and makes the host wait for the device. Here nothing is done in a step that uses all
parameters. A rank that misses some runs a second backward that gives each a gradient of −0.0, which changes no sum, and
DDP sends what is left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.errors import ConfigError

# By number, or by name where TORCH_DISTRIBUTED_DEBUG is set.
MISSING = re.compile(r"did not receive grad for rank \d+ ?: *([^\n]*)")


def is_complete(model: nn.Module) -> bool:
    """True unless DDP's reduction of the last backward still waits for some parameter of this rank."""
    return _what_is_missing(model) is None


def complete_backward(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give DDP the gradients that it still waits for on this rank. `parameters` are all that it reduces, in its order.

    A parameter that no rank has used has no gradient afterwards, as on one process. Waits for the device. Raises
    `ConfigError` where DDP does not say which parameters it misses.
    """
    names = _missing_names(_what_is_missing(model) or "", list(parameters))
    missing = [parameters[name] for name in names]
    if missing:
        zeros = [torch.full_like(parameter, -0.0) for parameter in missing]
        torch.autograd.backward(missing, zeros)
    if not missing or not is_complete(model):
        raise ConfigError(
            "run.reproducibility",
            "a micro-batch uses only a part of the parameters, and DDP does not say which; set it to bitwise, which "
            "does without DDP",
        )
    _forget_unused(missing)


def _forget_unused(parameters: list[nn.Parameter]) -> None:
    """Take the gradients from parameters to whose −0.0 no rank has added: any number but −0.0 would have changed it."""
    untouched = []
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        untouched.append(((gradient == 0) & gradient.signbit()).all())
    for parameter, is_unused in zip(
        parameters, torch.stack(untouched).tolist(), strict=True
    ):
        if is_unused:
            parameter.grad = None


def _what_is_missing(model: nn.Module) -> str | None:
    """DDP's own complaint about the last backward, None if there is none."""
    if not isinstance(model, DistributedDataParallel):
        return None
    try:
        model._check_reducer_finalized()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return str(error)
    return None


def _missing_names(message: str, names: list[str]) -> list[str]:
    found = MISSING.search(message)
    words = re.split(r"[\s,]+", found[1].strip()) if found else []
    missing = []
    for word in words:
        if word.isdecimal() and int(word) < len(names):
            missing.append(names[int(word)])
        elif word in names:
            missing.append(word)
    return missing
