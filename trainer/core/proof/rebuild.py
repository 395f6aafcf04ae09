"""Is everything that a step needs in the checkpoint before it?

Two copies of the model, the loss and the optimizer begin alike. One takes a step, and what a checkpoint would hold of
it goes into the other. Then both take the next step, which must be the same one.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.components.optimizer import (
    build_optimizer,
    load_named_state,
    named_state,
)
from trainer.components.task import Task
from trainer.core.forward import Forward
from trainer.core.further import (
    LossState,
    read_further,
    restore_evaluated,
    restore_modes_of,
)
from trainer.core.proof.compare import Difference, compare
from trainer.core.proof.finding import Finding
from trainer.core.proof.state import ModuleState, without_trace
from trainer.core.proof.trial import Trial
from trainer.exact.model_and_loss import LOSS_PREFIX, ModelAndLoss
from trainer.exact.moving_buffers import Buffer, keep_objects, other_buffers
from trainer.storage import checkpoint
from trainer.storage.host_copies import host_copies

CHECK = "rebuild"
NAMES_IN_A_MESSAGE = 3
TOLERANCE_ON_GPU = 1e-4  # where a kernel may add in another order each time
REMEDY = (
    "keep it in a buffer, or return it by get_extra_state (a module) or state_dict (an optimizer), or pass an object "
    "with state_dict and load_state_dict in `stateful`"
)
# Of torch's own optimizers, besides what `state_dict` returns.
OF_OPTIMIZER = frozenset(vars(torch.optim.SGD([torch.zeros(1)], lr=0.1)))


@dataclass
class Copy:
    """A model, a loss and an optimizer that nobody else has."""

    model: nn.Module
    loss: Task
    optimizer: Optimizer
    forward: Forward
    state: LossState
    moving: list[Buffer]


def check_rebuild(trial: Trial) -> list[Finding]:
    """Compare a step after a step with a step after a checkpoint."""
    with without_trace(trial.run):
        going_on, rebuilt = _copy(trial), _copy(trial)
        _step(trial, going_on, 0)
        _load(going_on, rebuilt)
        missing = _differing_attributes(going_on, rebuilt)
        _step(trial, going_on, 1)
        _step(trial, rebuilt, 1)
        tolerance = None if trial.repeats_bits else TOLERANCE_ON_GPU
        difference = compare(_tensors(going_on), _tensors(rebuilt), tolerance)
    return [] if difference is None else [_finding(difference, missing)]


def _copy(trial: Trial) -> Copy:
    run = trial.run
    memo: dict[int, Any] = {}
    for module in (run.module, run.task):
        memo |= _computed_tensors(module)
    model, loss = deepcopy((run.module, run.task), memo)
    optimizer = build_optimizer(
        run.config.optimizer, model, head=run.config.model.head, loss=loss
    )
    forward = Forward(
        loss, run.precision, run.ranks.device, run.config.run.seed, run.forward.mix
    )
    moving = other_buffers(ModelAndLoss(model, loss))
    return Copy(model, loss, optimizer, forward, LossState(model, loss), moving)


def _computed_tensors(module: nn.Module) -> dict[int, Tensor]:
    """Copies, by the originals' `id`, of what deepcopy refuses: parts of a graph, such as the weight of `weight_norm`.

    The next forward computes them anew.
    """
    copies = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                copies[id(value)] = value.detach().clone()
    return copies


def _step(trial: Trial, copy: Copy, number: int) -> None:
    """One update by this rank's first micro-batch, as step `number` after the trial's."""
    step = trial.step._replace(number=trial.step.number + number)
    _, loss = copy.forward(copy.model, trial.batch(trial.own_index), step)
    weight = torch.as_tensor(loss.weight).to(loss.total).clamp(min=1)
    (loss.total / weight).backward()  # type: ignore[no-untyped-call]
    keep_objects(copy.moving)
    copy.optimizer.step()
    copy.optimizer.zero_grad()


def _load(source: Copy, target: Copy) -> None:
    """What a checkpoint would hold of `source`, loaded as a resume loads it."""
    weights = host_copies(checkpoint.model_tensors(source.model))
    whole = ModelAndLoss(source.model, source.loss)
    tensors, numbers = named_state(source.optimizer, whole)
    further = read_further(source.model, source.state, source.moving)
    checkpoint.restore_model(target.model, weights)
    further = deepcopy(further)
    restore_evaluated(further, target.model, target.state)
    load_named_state(
        target.optimizer,
        ModelAndLoss(target.model, target.loss),
        {name: tensor.clone() for name, tensor in tensors.items()},
        deepcopy(numbers),
    )
    restore_modes_of(further, target.model)


def _tensors(copy: Copy) -> dict[str, Tensor | None]:
    whole = ModelAndLoss(copy.model, copy.loss)
    return dict(whole.named_parameters()) | dict(whole.named_buffers())


# ---------------------------------------------------------------- what is in no checkpoint


def _differing_attributes(going_on: Copy, rebuilt: Copy) -> list[str]:
    """The names of plain attributes that differ although the checkpoint is loaded."""
    names = _differing(going_on.model, rebuilt.model)
    names += [LOSS_PREFIX + n for n in _differing(going_on.loss, rebuilt.loss)]
    first, second = vars(going_on.optimizer), vars(rebuilt.optimizer)
    for name in first.keys() - OF_OPTIMIZER:
        if _is_number(first[name]) and first[name] != second.get(name):
            names.append(f"the optimizer's {name}")
    return names


def _differing(module: nn.Module, other: nn.Module) -> list[str]:
    parts = dict(other.named_modules())
    return ModuleState(module, weights=False).differences(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _finding(difference: Difference, missing: list[str]) -> Finding:
    shown = ", ".join(missing[:NAMES_IN_A_MESSAGE])
    cause = f": no checkpoint has {shown}" if missing else ""
    return Finding(
        CHECK,
        f"the step after a checkpoint is another one than the step without a stop{cause} ({difference})",
        REMEDY,
    )
