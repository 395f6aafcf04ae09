"""Which operations of a run's model, loss and metrics CUDA refuses in bitwise mode: known before training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.core.metrics import detach
from trainer.core.proof.state import without_trace
from trainer.core.run import Run
from trainer.errors import ConfigError
from trainer.exact.determinism import deterministic_algorithms
from trainer.exact.refused import RefusedOperations

WATCHED_SAMPLES = 4  # any number of them runs the same operations


def refused_operations(run: Run) -> list[str]:
    """A line for each operation that CUDA refuses in bitwise mode: its name, where it is, what to do.

    Found in one forward and backward of a few samples, which leaves no trace, on the CPU as on a GPU. Augmentation is
    not looked at: it is run on the host. Nor is a compiled model: its kernels are others.
    """
    if run.config.train.compile or run.ranks.device.type not in ("cpu", "cuda"):
        return []
    step = run.plan.step(0)
    run.module.train()
    watch = RefusedOperations(run.module)
    with without_trace(run), _warnings_in_place_of_errors():
        ids = run.plan.sample_ids(step, 0)[:WATCHED_SAMPLES]
        batch = run.train_loader.peek(ids)
        with watch.watching():
            output, loss = run.forward(run.module, batch, step)
            loss.total.backward()  # type: ignore[no-untyped-call]
            run.task.metric_sums(detach(output), batch.targets)
    return watch.messages()


def refuse_nondeterministic(run: Run) -> None:
    """Raise `ConfigError` where a bitwise run on CUDA would fail in its first step; it names every reason at once."""
    if not run.bitwise or run.ranks.device.type != "cuda":
        return
    lines = refused_operations(run)
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise ConfigError(
            "run.reproducibility",
            f"bitwise needs deterministic kernels, and CUDA has none for{listed}\nor use run.reproducibility=standard",
        )


@contextmanager
def _warnings_in_place_of_errors() -> Iterator[None]:
    """Let CUDA run what it would refuse, so that the first refusal does not hide the others."""
    with deterministic_algorithms(warn_only=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
