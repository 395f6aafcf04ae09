"""The state of a run that is neither a weight nor a buffer of the model's `state_dict` nor an optimizer's named state.

A checkpoint keeps it as one more stateful object, under the name `further`, and only if there is any:

    loss         the tensors of the loss's modules that training has changed
    buffers      moving buffers that no `state_dict` has (`persistent=False`), by name
    eval_modules the names of modules in eval mode, apart from frozen ones
    extra_state  what the model's modules return by `get_extra_state`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import LockstepError
from trainer.exact.batch_norm import is_held
from trainer.exact.model_and_loss import LOSS_PREFIX, ModelAndLoss
from trainer.exact.moving_buffers import Buffer, other_buffers

OF_BEST = ("loss", "buffers", "extra_state")  # what an evaluation needs


class LossState:
    """Which tensors of a loss have changed since training began. They are state; the others are made again."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        self._whole = ModelAndLoss(model, loss)
        self._restored: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """Training begins: what has happened to the tensors by now was no training."""
        self._marks = {name: _mark(part) for name, part in self._modules()}

    def read(self, moving: Sequence[Buffer] = ()) -> dict[str, Tensor]:
        """The tensors of each module of the loss in which one has changed. Copies of none.

        A module is kept whole: torch's functions do not mark every tensor that they write.
        """
        names_moving = {buffer.name for buffer in moving}
        state: dict[str, Tensor] = {}
        for name, part in self._modules():
            tensors = _tensors(name, part)
            has_changed = _mark(part) != self._marks.get(name)
            if has_changed or name in self._restored or names_moving & tensors.keys():
                state |= tensors
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load what `read` returned. Raises `LockstepError` if the loss has other tensors."""
        for name, part in self._modules():
            tensors = _tensors(name, part)
            for key in tensors.keys() & state.keys():
                tensor, saved = tensors[key], state[key]
                if tensor.shape != saved.shape:
                    raise LockstepError(
                        f"{key} is {tuple(saved.shape)} in the checkpoint and {tuple(tensor.shape)} in this "
                        f"run; use the loss that the run was started with"
                    )
                tensor.copy_(saved)
                # Such a module goes into later checkpoints, too, whether training changes it again or not.
                self._restored.add(name)

    def _modules(self) -> list[tuple[str, nn.Module]]:
        return list(self._whole.named_loss_modules())


def _tensors(path: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, by their names in the loss."""
    dot = "" if path == LOSS_PREFIX else "."
    tensors = {}
    for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            tensors[f"{path}{dot}{key}"] = tensor
    return tensors


def _mark(module: nn.Module) -> list[tuple[int, int]]:
    """What tells whether a tensor was replaced or written: torch counts every write in place."""
    marks = []
    for tensor in _tensors("", module).values():
        marks.append((id(tensor), tensor._version))
    return marks


def read_further(
    model: nn.Module, loss: LossState, moving: Sequence[Buffer]
) -> dict[str, Any]:
    """What a checkpoint keeps besides weights and optimizer state; {} if there is nothing."""
    buffers = {}
    for buffer in moving:
        is_of_loss = buffer.name.startswith(LOSS_PREFIX)  # which has them all
        if not buffer.is_saved and not is_of_loss:
            buffers[buffer.name] = buffer.tensor
    entries: dict[str, Any] = {
        "loss": loss.read(moving),
        "buffers": buffers,
        "eval_modules": _modules_in_eval_mode(model),
        "extra_state": _extra_state(model),
    }
    return {name: value for name, value in entries.items() if value}


def of_best(further: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `further` that belongs to the best model."""
    return {name: value for name, value in further.items() if name in OF_BEST}


def restore_evaluated(
    state: Mapping[str, Any], model: nn.Module, loss: LossState
) -> None:
    """Load what `read_further` returned, but for the modes: `restore_modes_of` comes after `model.train()`."""
    loss.restore(state.get("loss", {}))
    restore_beside_weights(state, model)


def restore_beside_weights(state: Mapping[str, Any], model: nn.Module) -> None:
    """Load what belongs to the model and is not in its weights' file."""
    _restore_buffers(model, state.get("buffers", {}))
    modules = dict(model.named_modules())
    for name, value in state.get("extra_state", {}).items():
        modules[name].set_extra_state(value)


def restore_modes_of(state: Mapping[str, Any], model: nn.Module) -> None:
    """Put the modules that were in eval mode at the checkpoint into it."""
    names = set(state.get("eval_modules", []))
    for name, module in model.named_modules():
        if name in names and not is_held(module):
            # Not `eval()`, which would put its parts into the mode, too.
            module.training = False


@torch.no_grad()
def _restore_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for buffer in other_buffers(ModelAndLoss(model)):
        saved = state.get(buffer.name)
        if saved is not None and saved.shape == buffer.tensor.shape:
            buffer.tensor.copy_(saved)


def _modules_in_eval_mode(model: nn.Module) -> list[str]:
    names = []
    for name, module in model.named_modules():
        if not module.training and not is_held(module):
            names.append(name)
    return names


def _extra_state(model: nn.Module) -> dict[str, Any]:
    states = {}
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            states[name] = module.get_extra_state()
    return states
