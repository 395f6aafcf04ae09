"""What does a training forward change, besides what a run keeps in order?

Running statistics, and buffers by the rule of `trainer.exact.moving_buffers`, are the same on any number of processes.
A plain attribute that a forward changes is not: it changes once for every micro-batch that its process runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.core.proof.compare import gradients_of
from trainer.core.proof.finding import Finding
from trainer.core.proof.state import ModuleState, same_bits, without_trace
from trainer.core.proof.trial import Trial
from trainer.errors import listed
from trainer.exact.model_and_loss import LOSS_PREFIX, ModelAndLoss

CHECK = "moved"
NAMES_IN_A_MESSAGE = 3
COUNTED = (bool, int, float, complex, str, list, dict, set, tuple)
REMEDY_OF_ATTRIBUTE = (
    "keep it in a buffer (register_buffer), which every micro-batch finds as the step began with it, or change it "
    "after the step, in an observer"
)
# Of torchvision's detectors: the strides of the backbone, and anchors in the dtype of the images.
SET_ONCE = {
    "MultiScaleRoIAlign": ("scales", "map_levels"),
    "AnchorGenerator": ("cell_anchors",),
}
# What a step may do to a weight. At the run's start a teacher is a copy of its student, and to follow moves nothing.
NUDGE = 1.01
REMEDY_OF_PARAMETER = "change it after the step, in an observer, or make it a buffer"


def check_moved(trial: Trial) -> list[Finding]:
    """Run this rank's first micro-batch and see what has changed."""
    run = trial.run
    if len(trial.step.micro_batches) == 1:
        return []  # one process runs it, and no other number can
    whole = ModelAndLoss(run.module, run.task)
    with without_trace(run, weights=True):
        _nudge(whole)
        states = [ModuleState(run.module), ModuleState(run.task)]
        before = _run(trial)
        changed = dict.fromkeys(states[0].changes())
        changed |= dict.fromkeys(f"{LOSS_PREFIX}{name}" for name in states[1].changes())
        parameters = dict(whole.named_parameters())
        buffers = dict(_buffers(whole))
        attributes = []
        for name in changed:
            if name in parameters or name in buffers:
                continue
            if not _is_of_lockstep(whole, name) and not _is_set_once(whole, name):
                attributes.append(name)
        read = attributes
        if attributes and not any(_is_counted(whole, name) for name in attributes):
            # Kept for somebody to look at, such as an attention map, unless the next forward shows it.
            for state in states:
                state.restore(attributes=False)
            read = [] if _is_same(before, _run(trial)) else attributes
        moved_parameters = [name for name in changed if name in parameters]
    findings = []
    if read:
        findings.append(_finding("keeps", read, REMEDY_OF_ATTRIBUTE))
    if moved_parameters:
        findings.append(
            _finding("writes parameters:", moved_parameters, REMEDY_OF_PARAMETER)
        )
    return findings


@torch.no_grad()
def _nudge(whole: ModelAndLoss) -> None:
    """Change all trained parameters a little, as a step would."""
    for parameter in whole.parameters():
        if parameter.requires_grad:
            parameter.mul_(NUDGE)


def _run(trial: Trial) -> dict[str, Tensor | None]:
    """The loss and the gradients of a micro-batch."""
    run = trial.run
    for module in (run.module, run.task):
        module.zero_grad()
    total, _ = trial.forward_and_backward(trial.own_index)
    results: dict[str, Tensor | None] = {"the loss": total.detach().clone()}
    for name, gradient in gradients_of(run.module, run.task).items():
        results[name] = None if gradient is None else gradient.clone()
    return results


def _is_same(
    first: Mapping[str, Tensor | None], second: Mapping[str, Tensor | None]
) -> bool:
    for name, tensor in first.items():
        other = second[name]
        if tensor is None or other is None:
            if tensor is not other:
                return False
        elif not same_bits(tensor, other):
            return False
    return True


def _buffers(whole: ModelAndLoss) -> list[tuple[str, Tensor | None]]:
    """All buffers by the names of `ModuleState`, those that appear twice included."""
    buffers = []
    for path, module in whole.named_modules():
        dot = "." if path and path != LOSS_PREFIX else ""
        for key, tensor in module._buffers.items():
            buffers.append((f"{path}{dot}{key}", tensor))
    return buffers


def _is_counted(whole: ModelAndLoss, name: str) -> bool:
    """True for a number or a collection: it may matter in a later step, if not in this one."""
    owner, key = _owner(whole, name)
    value: Any = vars(owner).get(key)
    return isinstance(value, COUNTED)


def _is_of_lockstep(whole: ModelAndLoss, name: str) -> bool:
    """True for what a task of ours notes in its first forwards, such as whether a weight was checked."""
    owner, _ = _owner(whole, name)
    return type(owner).__module__.startswith("trainer.components.")


def _is_set_once(whole: ModelAndLoss, name: str) -> bool:
    """True for what torchvision's detectors note in the first forward, and what every forward would find the same."""
    owner, key = _owner(whole, name)
    return key in SET_ONCE.get(type(owner).__name__, ())


def _owner(whole: ModelAndLoss, name: str) -> tuple[nn.Module, str]:
    """The module that has the attribute `name`, and the attribute's own name."""
    root: nn.Module | None = whole.model
    if name.startswith(LOSS_PREFIX):
        root, name = whole.loss, name.removeprefix(LOSS_PREFIX)
    assert root is not None
    path, _, key = name.rpartition(".")
    return root.get_submodule(path), key


def _finding(verb: str, names: list[str], remedy: str) -> Finding:
    shown = listed(names, NAMES_IN_A_MESSAGE)
    return Finding(
        CHECK,
        f"a training forward {verb} {shown}, once for every micro-batch of its own process",
        remedy,
    )
