"""Before anything is trained: what would fail later, and errors of torch in the run's own terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.components.compiling import compile_failure
from trainer.core.first_forward import check_first_forward
from trainer.core.fuse_check import choose_fuse
from trainer.core.loader_limits import check_loader_limits
from trainer.core.misfit import optimizer_misfit
from trainer.core.out_of_memory import explain_out_of_memory
from trainer.core.refused import refuse_nondeterministic
from trainer.core.rehearsal import check_disk, rehearse
from trainer.core.run import Run
from trainer.errors import LockstepError
from trainer.exact.determinism import refused_operation


def try_out(run: Run) -> tuple[int, str]:
    """Find out what would fail later; returns the number of micro-batches in one forward, and why it is 1 with `auto`.

    It leaves no trace in the model or in random generators. A collective. Raises `ConfigError` or `DataError`.
    """
    refuse_nondeterministic(run)
    check_first_forward(run)
    chosen = choose_fuse(run)
    rehearse(run)
    check_loader_limits(run)
    check_disk(run)
    return chosen


@contextmanager
def explained(run: Run, position: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """A context whose errors from torch are told in the run's own terms, where there are such.

    `position` gives the number of micro-batches in one forward, and the step that is run.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        cause: LockstepError | None = None
        if isinstance(error, RuntimeError):
            # The backward, too, is compiled when it first runs.
            cause = (
                compile_failure(error)
                or refused_operation(error)
                or explain_out_of_memory(error, run, *position())
                or run.ranks.explain(error)
            )
        cause = cause or optimizer_misfit(run.config.optimizer.name, error)
        if cause is None:
            raise
        raise cause from None
