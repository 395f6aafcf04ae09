"""One message for what a model, its data and its loss cannot do together, in place of an error from within torch.

Only errors of the kinds that a wrong shape, dtype or type of value raises are taken for that. A defect of the program
that raises another kind keeps its traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.components.task import Task
from trainer.errors import ConfigError, LockstepError, may_pass
from trainer.exact.determinism import DEVICE_ASSERT, refused_operation
from trainer.exact.structures import describe_tensors

KINDS = (RuntimeError, TypeError, ValueError, IndexError, AssertionError)
TORCH = Path(torch.__file__).parent
PACKAGE = Path(__file__).parents[1]
LONGEST_REASON = 200  # characters
# As torch says it of a parameter that is shared out, where a whole one is needed.
MIXED_SHARDS = "mixed torch.Tensor and DTensor"


def is_misfit(error: Exception) -> bool:
    """True if `error` may be due to shapes and dtypes; not if it has a message of ours, or is of device or memory."""
    is_of_device = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
    if isinstance(error, LockstepError) or is_of_device or may_pass(error):
        return False
    if not isinstance(error, RuntimeError):
        return True
    return DEVICE_ASSERT not in str(error) and refused_operation(error) is None


@contextmanager
def explained_by(explain: Callable[[Exception], ConfigError]) -> Iterator[None]:
    """A context whose misfits become what `explain` makes of them."""
    try:
        yield
    except KINDS as error:
        if not is_misfit(error):
            raise
        raise explain(error) from error


def explained(
    task: Task, method: str, output: Any, targets: Any
) -> AbstractContextManager[None]:
    """A context for a call of the task's `method`: its errors become a `ConfigError` with shapes and dtypes."""
    return explained_by(partial(loss_misfit, task, method, output, targets))


def loss_misfit(
    task: Task, method: str, output: Any, targets: Any, error: Exception
) -> ConfigError:
    """The message for an error of `task.loss_sum` or `task.metric_sums`."""
    return ConfigError(
        "loss.name",
        f"{type(task).__name__}.{method} failed on the model's output {describe_tensors(output)} with the data set's "
        f"targets {describe_tensors(targets)}: {_reason(error)}; change the data set's targets, model.num_classes or "
        f"loss.name so that they fit",
    )


def metric_misfit(
    key: str, metric: Any, method: str, inputs: Any, error: Exception
) -> ConfigError:
    """The message for an error of a metric's `update`, whose `inputs` they were, or of its `compute`."""
    name = type(metric).__name__
    if method == "compute":
        return ConfigError(
            key,
            f"{name}.compute failed over all validation samples: {_reason(error)}",
        )
    return ConfigError(
        key,
        f"{name}.update failed on {describe_tensors(inputs)}: {_reason(error)}; change its arguments, or what it is "
        f"given, by a trainer.Task with `metric_inputs` (see docs/metrics.md)",
    )


def model_misfit(model: Any, inputs: Any, error: Exception) -> ConfigError:
    """The message for an error of the model's forward."""
    return ConfigError(
        "model.name",
        f"{type(model).__name__} failed on inputs {describe_tensors(inputs)}: {_reason(error)}; change the model, or "
        f"the data set's inputs by data.train_transforms and data.val_transforms, so that they fit",
    )


def shard_misfit(error: Exception) -> ConfigError | None:
    """The message for a forward that needs a parameter of which this rank has a part; None for other errors."""
    if MIXED_SHARDS not in str(error):
        return None
    return ConfigError(
        "train.parallel",
        f"fsdp gathers a block's parameters for the block's own forward alone, and the model or the loss uses some "
        f"elsewhere: {_reason(error)}; use them within the block, name larger blocks in the model's "
        f"`_no_split_modules`, or use ddp",
    )


def is_from_a_layer(error: Exception) -> bool:
    """True if the error was raised within a layer or function of torch.nn, which got a wrong shape, say."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    # Models check their inputs' sizes by `torch._assert`.
    is_check = frames[-1].name == "_assert"
    return is_check or TORCH / "nn" in Path(frames[-1].filename).parents


def optimizer_misfit(name: str, error: Exception) -> ConfigError | None:
    """The message for what one of torch's optimizers raised in a step; None for an error from elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    is_from_step = any(TORCH / "optim" in Path(f.filename).parents for f in frames)
    if not is_from_step or not is_misfit(error):
        return None
    return ConfigError(
        "optimizer.name",
        f"{name} cannot take a step: {_reason(error)}; change it or its arguments",
    )


def _reason(error: Exception) -> str:
    """The error's kind and first line, and the last line of the user's code that it went through."""
    message = str(error).strip()
    first_line = message.splitlines()[0] if message else ""
    text = f"{type(error).__name__}: {first_line[:LONGEST_REASON].rstrip('.')}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        folders = Path(frame.filename).parents
        if TORCH not in folders and PACKAGE not in folders:
            return f"{text} ({frame.filename}, line {frame.lineno})"
    return text
