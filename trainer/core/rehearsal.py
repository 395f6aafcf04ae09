"""What would fail only at an epoch's end, tried before the first step: nothing is trained yet, so nothing is lost.

All of it leaves no trace in the model or in random generators.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from trainer.core.observers import Stateful
from trainer.core.proof.state import without_trace
from trainer.core.run import Run
from trainer.errors import ConfigError
from trainer.exact.plan import Step
from trainer.process.machine import free_bytes
from trainer.storage.run_directory import run_path
from trainer.storage.stateful import split_state


def rehearse(run: Run) -> None:
    """Run the shortest micro-batch of an epoch forward, and a few validation samples. A collective.

    Raises `ConfigError` or `DataError`, the same on every rank.
    """
    run.ranks.on_each(lambda: _rehearse(run))


def _rehearse(run: Run) -> None:
    # With shards every forward is a collective, and here all ranks run the same samples.
    with without_trace(run):
        # SyncBatchNorm's forward is a collective, which a rank whose sample fails would miss.
        if run.config.batch_norm.mode != "sync":
            _run_shortest_micro_batch(run)
        for item in run.evaluation_sets:
            item.evaluator.rehearse()


def _run_shortest_micro_batch(run: Run) -> None:
    """Run it in training mode, unless the first step has one of that size: BatchNorm refuses a single sample, say."""
    step, index = _shortest_micro_batch(run)
    if step.number == 1:
        return
    batch = run.train_loader.peek(run.plan.sample_ids(step, index), index)
    run.module.train()
    run.forward(run.module, batch, step)


def _shortest_micro_batch(run: Run) -> tuple[Step, int]:
    """The first step that has a micro-batch as short as the run's shortest, and that micro-batch's index."""
    plan = run.plan
    first = plan.step(0)
    steps = min(plan.steps_per_epoch, plan.total_steps)
    last = plan.step(steps - 1)
    sizes = []
    for step in (first, last):
        for index, (start, end) in enumerate(step.micro_batches):
            sizes.append((end - start, step.number, index))
    _, number, index = min(sizes)
    return plan.step(number - 1), index


def check_states(objects: Mapping[str, Stateful], run: Run) -> None:
    """Raise `LockstepError` where a checkpoint could not keep the state of an object. A collective."""

    def split_all() -> None:
        for name, value in objects.items():
            split_state(name, value.state_dict())

    run.ranks.on_each(split_all)


def check_disk(run: Run) -> None:
    """Raise `ConfigError` if the disk of the run's directory has no room for one checkpoint. A collective."""
    run.ranks.on_main(lambda: _check_disk(run))


def _check_disk(run: Run) -> None:
    directory = run_path(run.config.run)
    free = free_bytes(directory)
    # An optimizer's state and the best model come on top, so a run may still fill the disk.
    needed = _bytes_of(run.module)
    if free is not None and free < needed:
        raise ConfigError(
            "run.dir",
            f"the disk of {directory} has {free / 1e6:,.1f} MB free, and the weights of one checkpoint alone take "
            f"{needed / 1e6:,.1f} MB; free some space, or name a directory on another disk",
        )


def _bytes_of(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.nbytes for tensor in tensors)
