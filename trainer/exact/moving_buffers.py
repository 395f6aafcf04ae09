"""Buffers that a forward moves and that are no norm layer's statistics: an embedding that follows, a step counter.

The rule, the same on any number of processes: every micro-batch starts from the buffers that the step began with, and
the step ends with those that its last micro-batch leaves, on every rank.

Which buffers move is observed in the first step. A model without buffers of this kind pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.errors import ConfigError
from trainer.exact.model_and_loss import LOSS_PREFIX, ModelAndLoss
from trainer.exact.plan import Step
from trainer.process.ranks import Ranks

# Python modules whose classes only read their buffers, such as class weights.
MODULES_THAT_MOVE_NONE = (
    "torch.nn.modules.loss",
    "torchvision.ops.misc",
    "trainer.components.",
)
NORM_BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}


class Buffer:
    """One buffer of a module, under its `name` in the model or the loss."""

    def __init__(self, name: str, owner: nn.Module, key: str) -> None:
        self.name = name
        self._owner = owner
        self._key = key
        tensor = self._present()
        assert tensor is not None
        self.tensor = tensor

    @property
    def is_saved(self) -> bool:
        """True if `state_dict` has it."""
        return self._key not in self._owner._non_persistent_buffers_set

    @property
    def mark(self) -> tuple[int, int]:
        """Another value after any change that torch notes, known without asking the device."""
        present = self._present()
        return id(present), -1 if present is None else present._version

    @property
    def is_dropped(self) -> bool:
        """True for what can be made again, such as a table of positions, once it has another shape."""
        return not self.is_saved and not self._fits()

    def adopt(self) -> None:
        """Between steps: the tensor that is there now is the buffer's own; DDP's preparation may have put it there."""
        present = self._present()
        if present is not None and self._fits():
            self.tensor = present

    def take_back(self) -> Tensor | None:
        """Put the buffer's own tensor back where forward has put another; returns that other one.

        Raises `ConfigError` where it has another shape: no checkpoint of it could be loaded again.
        """
        present = self._present()
        if present is self.tensor or self.is_dropped:
            return None
        if present is None or not self._fits():
            raise ConfigError(
                "model",
                f'buffer "{self.name}" changes its shape in forward, so a checkpoint of it would fit no model; keep '
                f"one shape, or register it with persistent=False if it can be made again",
            )
        self._owner._buffers[self._key] = self.tensor
        return present.detach()

    def _fits(self) -> bool:
        present = self._present()
        return present is not None and present.shape == self.tensor.shape

    def _present(self) -> Tensor | None:
        return self._owner._buffers.get(self._key)


def other_buffers(model: ModelAndLoss, *, norms: bool = False) -> list[Buffer]:
    """The buffers that are no norm layer's statistics, each once; with `norms`, all buffers."""
    buffers: dict[int, Buffer] = {}
    for path, module in model.named_modules():
        if type(module).__module__.startswith(MODULES_THAT_MOVE_NONE) and not norms:
            continue
        for key, tensor in module._buffers.items():
            is_of_norm = isinstance(module, _NormBase) and key in NORM_BUFFERS
            if tensor is None or (is_of_norm and not norms):
                continue
            dot = "." if path and path != LOSS_PREFIX else ""
            buffers.setdefault(id(tensor), Buffer(f"{path}{dot}{key}", module, key))
    return list(buffers.values())


class Copies:
    """Copies of some buffers, which may be put back."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._buffers = list(buffers)
        self._tensors = [buffer.tensor for buffer in buffers]
        self._copies = [tensor.detach().clone() for tensor in self._tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Put tensors and values back."""
        for buffer in self._buffers:
            buffer.take_back()
        if self._tensors:
            # Through `data`, which gives them no new version: they are what they were.
            torch._foreach_copy_(
                [tensor.data for tensor in self._tensors], self._copies
            )

    def differences(self) -> Tensor:
        """For each buffer, whether its values are others by now, `(buffers,)`."""
        pairs = zip(self._tensors, self._copies, strict=True)
        return torch.stack([(tensor != copy).any() for tensor, copy in pairs])


@torch.no_grad()
def keep_objects(buffers: Sequence[Buffer]) -> None:
    """After a forward that may have replaced buffers: the tensors from before, with the new values."""
    for buffer in buffers:
        replacement = buffer.take_back()
        if replacement is not None:
            buffer.tensor.copy_(replacement)


@contextmanager
def preserved_buffers(model: ModelAndLoss, *, norms: bool = False) -> Iterator[None]:
    """Put the buffers of `other_buffers` back at the end, also after an error."""
    copies = Copies(other_buffers(model, norms=norms))
    try:
        yield
    finally:
        copies.restore()


class MovingBuffers:
    """Keeps the rule for the buffers of a model and its loss.

    `has_candidates` is False where there is nothing to keep.

    `moving` has those that move. `late` names those that moved first after the first step, and until then followed no
    rule.
    """

    def __init__(self, model: ModelAndLoss, ranks: Ranks) -> None:
        self._ranks = ranks
        self._candidates = other_buffers(model)
        # Where there are none, `begin`, `micro_batch` and `finish` need not be called.
        self.has_candidates = bool(self._candidates)
        self.moving: list[Buffer] = []
        self.late: list[str] = []
        # The candidates that do not move, once the first step has shown which do.
        self._still: list[Buffer] = []
        self._is_first_step = True
        self._is_first_forward = True
        self._start: Copies | None = None
        self._marks: list[tuple[int, int]] = []

    def begin(self, step: Step) -> None:
        """Before the step's micro-batches."""
        self._is_first_forward = True
        self._start = None
        for buffer in self._candidates:
            buffer.adopt()
        first, end = step.ranks[self._ranks.rank]
        if self._is_first_step:
            self._start = Copies(self._candidates)
            self._marks = [buffer.mark for buffer in self._candidates]
            self._has_moved = [False] * len(self._candidates)
            self._differences: list[Tensor] = []
            return
        self._marks = [buffer.mark for buffer in self._still]
        # One micro-batch starts from what is there, and nothing has to be put back.
        if self.moving and end - first > 1:
            self._start = Copies(self.moving)

    def micro_batch(self) -> None:
        """Before each of this rank's forwards: put back what the step began with."""
        if self._start is None:
            return
        if not self._is_first_forward:
            if self._is_first_step:
                self._note_moves(self._start)
            self._start.restore()
        self._is_first_forward = False

    @torch.no_grad()
    def finish(self, step: Step) -> None:
        """After this rank's last micro-batch: what the step's last one left, on every rank. A collective."""
        if self._is_first_step and self._start is not None:
            self._note_moves(self._start)
            self._find_moving()
        else:
            self._find_late()
        self._start = None
        keep_objects(self.moving)
        if self.moving:
            tensors = [buffer.tensor for buffer in self.moving]
            self._ranks.broadcast_together(tensors, _owner_of_last(step))

    def settle(self) -> list[str]:
        """Let the late ones follow the rule too, from rank 0's values on; returns their names. A collective."""
        if not self._candidates:
            return []
        names = sorted(set(self._ranks.gather(self.late)))
        self.late = []
        # In the order of the model, which is the same on every rank: they are sent as one.
        late = [buffer for buffer in self._still if buffer.name in names]
        self._still = [buffer for buffer in self._still if buffer.name not in names]
        self.moving += late
        keep_objects(late)
        if late:
            self._ranks.broadcast_together([buffer.tensor for buffer in late], 0)
        return names

    # ---------------------------------------------------------------- which buffers move

    def _note_moves(self, start: Copies) -> None:
        """After a forward of the first step. Values are compared, too: not every function marks what it writes."""
        for number, buffer in enumerate(self._candidates):
            if buffer.mark != self._marks[number]:
                self._has_moved[number] = True
        self._differences.append(start.differences())

    def _find_moving(self) -> None:
        """Agree with the other ranks on what moves. Waits for the device."""
        self._is_first_step = False
        other_values = torch.stack(self._differences).any(0).tolist()
        moves = list(map(bool.__or__, self._has_moved, other_values))
        is_dropped = [buffer.is_dropped for buffer in self._candidates]
        # Both in one question, for which all hosts wait.
        answers = self._ranks.any_rank_each(moves + is_dropped)
        count = len(self._candidates)
        for number, buffer in enumerate(self._candidates):
            if answers[count + number]:
                continue
            if answers[number]:
                self.moving.append(buffer)
            else:
                self._still.append(buffer)

    def _find_late(self) -> None:
        for buffer, mark in zip(self._still, self._marks, strict=True):
            if buffer.mark != mark and buffer.name not in self.late:
                self.late.append(buffer.name)


def _owner_of_last(step: Step) -> int:
    """The rank that runs the step's last micro-batch: the ranks after it have none."""
    count = len(step.micro_batches)
    for rank, (_, end) in enumerate(step.ranks):
        if end == count:
            return rank
    raise AssertionError("some rank runs the last micro-batch")
