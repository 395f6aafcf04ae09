"""Which micro-batches are recorded, which are replayed, and which stay eager.

A micro-batch is eager in the first steps, which show what it does besides computing. Then each layout of a batch is
recorded when a step begins. Its first replays, and the first one of every epoch, are compared with eager from the same
state, bit by bit. Whatever cannot be recorded, changes what a graph takes for granted, or gives other bits, is eager
again, and a line says why.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.components.task import WeightedSum
from trainer.core.backward import forward_and_backward
from trainer.core.graphs.compared import compare
from trainer.core.graphs.guard import Guard
from trainer.core.graphs.layout import NotRecordable, layout_of
from trainer.core.graphs.recorded import COMPARISONS, Recorded
from trainer.core.graphs.refusal import why_eager
from trainer.core.proof.state import ModuleState
from trainer.core.run import Run
from trainer.data.batches import MicroBatch
from trainer.errors import first_line
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.plan import Step
from trainer.exact.reduction import Reduction
from trainer.process.cuda_graph import Recorder, recorder_for

# The first step after a start or a thawing observes layers and buffers by itself.
WARM_UP_STEPS = 3
MOST_GRAPHS = 4  # at once: each keeps the memory of a forward and backward
# Of a run, where what a graph takes for granted changes again and again.
MOST_BEGINNINGS = 8


class Waiting(NamedTuple):
    """A layout to be recorded: a batch that has it, and a loss for its dtype."""

    batch: MicroBatch
    loss: Tensor


class MicroBatchGraphs:
    """Runs the forward and backward of a run's micro-batches on this process.

    Attributes: `replays`, how many micro-batches were replayed; `reason`, why all are eager from now on, "" until then.
    """

    def __init__(self, run: Run, reduction: Reduction, recorder: Recorder) -> None:
        self.replays = 0
        self.reason = why_eager(run)
        self._run = run
        self._reduction = reduction
        self._recorder = recorder
        self._whole = ModelAndLoss(run.module, run.task)
        self._device = next(self._whole.parameters()).device
        self._news: list[str] = []
        self._beginnings = 0
        self._step = 0
        self._is_steady = True  # eager has the same bits each time, as far as is known
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._beginnings += 1
        self._steps = 0  # since then
        self._guard: Guard | None = None
        self._changed_steps = 0  # in a row
        self._recorded: dict[Hashable, Recorded] = {}
        self._waiting: dict[Hashable, Waiting] = {}
        self._doubted: Recorded | None = None  # one whose replay had other bits
        self._doubt = ""

    def begin(self, step: Step) -> None:
        """Before the first micro-batch of `step`, while the reduction watches none: its hooks are not the model's."""
        if not self.reason:
            self._step = step.number
            self._begin_step(step)

    def forward_and_backward(
        self, model: nn.Module, batch: MicroBatch, step: Step
    ) -> tuple[Any, WeightedSum]:
        """Add a micro-batch's share of the step's gradient; returns its output and its loss."""
        eager = partial(
            forward_and_backward, self._run, self._reduction, model, batch, step
        )
        if self.reason:
            return eager()
        try:
            layout = layout_of(batch, self._device)
        except NotRecordable as error:
            self._refuse(str(error))
            return eager()
        if self._guard is None:
            return self._watched(eager, batch, step) if self._steps > 1 else eager()
        if self._changed_steps:
            return eager()
        recorded = self._recorded.get(layout)
        if recorded is not None:
            return self._replayed(recorded, eager, batch, step)
        result = eager()
        if len(self._recorded) + len(self._waiting) < MOST_GRAPHS:
            self._waiting[layout] = Waiting(batch, result[1].total.detach())
        return result

    def report(self, note: Callable[[str], None]) -> None:
        """Note what has happened since the last call, of any process. A collective."""
        news, self._news = self._news, []
        ranks = self._run.ranks
        by_line: dict[str, list[int]] = {}
        for rank, lines in enumerate(ranks.gather([news])):
            for line in lines:
                by_line.setdefault(line, []).append(rank)
        for line, where in by_line.items():
            who = ""
            if len(where) < ranks.count:
                numbers = ", ".join(map(str, where))
                who = f" (rank {numbers})"
            note(f"train.cuda_graphs{who}: {line}")

    # ---------------------------------------------------------------- between steps

    def _begin_step(self, step: Step) -> None:
        self._steps += 1
        if step.first_in_epoch:
            for recorded in self._recorded.values():
                recorded.comparisons_left = max(1, recorded.comparisons_left)
        if self._guard is not None:
            self._look_for_changes(self._guard)
        elif self._steps > WARM_UP_STEPS and self._knows_draws():
            self._guard = Guard(self._whole)
            if hook := self._guard.hooks():
                self._refuse(f"{hook} would not run in a replay")
        if self._guard is not None and not self._changed_steps:
            self._record_waiting()

    def _look_for_changes(self, guard: Guard) -> None:
        """A change that lasts for a step, as of a short last one, leaves it eager; for a longer one, begin anew."""
        change = guard.change()
        self._changed_steps = self._changed_steps + 1 if change else 0
        if self._changed_steps < 2:
            return
        if self._beginnings >= MOST_BEGINNINGS:
            self._refuse(f"what a graph takes for granted keeps changing: {change}")
        else:
            self._begin_anew()

    def _record_waiting(self) -> None:
        """Between steps, where no part of an earlier backward is left, whose stream a graph would have to wait for."""
        waiting, self._waiting = self._waiting, {}
        for layout, (batch, loss) in waiting.items():
            try:
                self._recorded[layout] = Recorded(
                    self._run, self._recorder, batch, loss
                )
            except NotRecordable as error:
                self._refuse(str(error))
            except Exception as error:
                # Of whatever kind: eager raises it, too, if it is the model's own.
                self._refuse(f"the recording failed: {_in_words(error)}")
            if self.reason:
                return

    def _refuse(self, reason: str) -> None:
        if self.reason:
            return
        self.reason = reason
        self._news.append(f"eager from step {self._step} on: {reason}")
        self._begin_anew()  # which frees the memory of graphs

    # ---------------------------------------------------------------- one micro-batch

    def _replayed(
        self,
        recorded: Recorded,
        eager: Callable[[], tuple[Any, WeightedSum]],
        batch: MicroBatch,
        step: Step,
    ) -> tuple[Any, WeightedSum]:
        if self._doubted is not None:
            return self._compared_with_itself(recorded, eager)
        if not recorded.comparisons_left:
            self.replays += 1
            return recorded.run(self._reduction, batch, step)
        replay = partial(recorded.replay, self._reduction, batch, step)
        result, difference = compare(self._run, recorded, replay, eager)
        recorded.comparisons_left -= 1
        is_expected = not self._is_steady and difference.is_rounding
        if difference.what and not is_expected:
            self._distrust(recorded, difference.what)
        elif not recorded.comparisons_left and not self.replays:
            self._news.append(f"micro-batches are replayed from step {step.number} on")
        return result

    def _distrust(self, recorded: Recorded, what: str) -> None:
        doubt = f"a replay gives {what} other bits"
        if self.replays:
            doubt += " (since the last comparison, others may have, too)"
        if not self._is_steady:
            self._refuse(f"{doubt}, and not by rounding alone")
        elif self._run.bitwise:
            # Eager has the same bits each time, and gradients that its backward sends cannot be taken back.
            self._refuse(doubt)
        else:
            self._doubted = recorded
            self._doubt = doubt

    def _compared_with_itself(
        self, recorded: Recorded, eager: Callable[[], tuple[Any, WeightedSum]]
    ) -> tuple[Any, WeightedSum]:
        """After a replay with other bits: has eager the same bits each time? Not all kernels have, in standard mode."""
        if recorded is not self._doubted:
            return eager()
        self._doubted = None
        result, difference = compare(self._run, recorded, eager, eager)
        if not difference.what:
            self._refuse(self._doubt)
            return result
        self._is_steady = False
        self._news.append(
            f"eager gives {difference.what} other bits each time, so replays are compared with it up to rounding"
        )
        recorded.comparisons_left = COMPARISONS
        return result

    def _watched(
        self,
        eager: Callable[[], tuple[Any, WeightedSum]],
        batch: MicroBatch,
        step: Step,
    ) -> tuple[Any, WeightedSum]:
        """Run eager, and see what it does that a replay would not."""
        modules = (self._run.module, self._run.task)
        states = [ModuleState(module, weights=False) for module in modules]
        buffers: dict[str, Tensor] = {}
        for module in modules:
            buffers |= dict(module.named_buffers(remove_duplicate=False))
        self._run.forward.seed(batch, step)
        before = torch.default_generator.get_state()
        result = eager()
        has_drawn = not torch.equal(before, torch.default_generator.get_state())
        if has_drawn and self._run.ranks.device.type != "cpu":
            self._refuse("the model or the loss draws from the CPU's generator")
        for state, module in zip(states, modules, strict=True):
            now = dict(module.named_buffers(remove_duplicate=False))
            for name in state.changes():
                if name not in now or now[name] is not buffers.get(name):
                    self._refuse(f"each forward changes {name}, and a replay would not")
                    return result
        return result

    def _knows_draws(self) -> bool:
        """True once it is known whether the model draws on the host, as it then may not."""
        draws = self._run.forward.host_draws
        if draws is not None and draws.are_made:
            self._refuse(
                "the model or the loss may draw from `random` or `numpy.random`"
            )
        return draws is not None and not draws.forwards_to_watch


def _in_words(error: Exception) -> str:
    kind = type(error).__name__
    text = first_line(error)
    return kind if text == kind else f"{kind}: {text}"


def build_graphs(run: Run, reduction: Reduction) -> MicroBatchGraphs | None:
    """What replays the run's micro-batches; None without `train.cuda_graphs`, and on a device without CUDA graphs."""
    if not run.config.train.cuda_graphs:
        return None
    recorder = recorder_for(run.ranks.device)
    return None if recorder is None else MicroBatchGraphs(run, reduction, recorder)
