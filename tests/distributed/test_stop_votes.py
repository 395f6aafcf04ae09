"""When ranks ask one another whether to stop: always in the same steps, and not in every one where steps are short."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.distributed.ranks import on_ranks
from trainer.process import signals
from trainer.process.ranks import Ranks
from trainer.process.signals import MOST_STEPS_BETWEEN_ANSWERS, StopRequest

STEPS = 400
SIGNALLED_AT = 200  # on rank 1
EPOCH = 90


def watch_stop(
    ranks: Ranks, seconds_a_step: float, *, has_epochs: bool = False
) -> tuple[int, list[int]]:
    """The step that the run stops after, and the steps after which this rank asked."""
    now = 0.0
    step = 0
    questions: list[int] = []
    ask = Ranks.largest_each_async

    def noted(values: list[int]) -> Callable[[], list[int]]:
        questions.append(step)
        return ask(ranks, values)

    ranks.largest_each_async = noted  # type: ignore[method-assign]
    signals.time = SimpleNamespace(monotonic=lambda: now)  # type: ignore[assignment, attr-defined]
    with StopRequest(ranks) as stop:
        while step < STEPS:
            step += 1
            now += seconds_a_step
            if step == SIGNALLED_AT and not ranks.is_main:
                signal.raise_signal(signal.SIGUSR1)
            if stop.agreed(begins_epoch=has_epochs and step % EPOCH == 1):
                break
    return step, questions


def test_ranks_ask_by_the_clock_of_rank_0() -> None:
    def stops() -> list[Any]:
        ranks = Ranks("fp32")
        seconds = [1.0, 0.001] if ranks.is_main else [0.0001, 10.0]
        without = [watch_stop(ranks, value) for value in seconds]
        return [*without, watch_stop(ranks, seconds[1], has_epochs=True)]

    here, there = on_ranks(2, stops)
    assert here == there
    (long_end, long_questions), (short_end, short_questions), (_, of_epochs) = here
    # Steps of a second: in every one, and the run stops after the next.
    assert long_questions == list(range(SIGNALLED_AT + 1))
    assert long_end == SIGNALLED_AT + 1
    # Steps of a millisecond: seldom, soon.
    assert short_questions[:6] == [0, 1, 3, 7, 15, 31]
    gaps = [b - a for a, b in itertools.pairwise(short_questions)]
    assert max(gaps) == MOST_STEPS_BETWEEN_ANSWERS
    assert SIGNALLED_AT < short_end <= SIGNALLED_AT + MOST_STEPS_BETWEEN_ANSWERS + 1
    # An epoch may change what a step costs.
    first = EPOCH + 1
    assert [q - first for q in of_epochs if first <= q < first + 31] == [0, 1, 3, 7, 15]
