"""Before training: how many micro-batches share a forward, found out and proved by trials that leave no trace."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainer.core.build import Run
from trainer.core.forward import Forward
from trainer.core.precision import Precision
from trainer.data.samples import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.fuse import ALONE
from trainer.exact.plan import Step
from trainer.exact.seeding import device_generator, preserved_cpu_generators

FEW = 4  # samples of a micro-batch that prove what more of them would
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-2}  # rounding stays far below, another mathematics above
CGROUP = Path("/sys/fs/cgroup")


def choose_fuse(run: Run) -> int:
    """The number that `batch.fuse` asks for, proved right, or the largest that fits: the same on every rank.

    Where several micro-batches in one forward are not what they are one by one, `auto` is 1, and `run.alone` says
    why; any number raises a `ConfigError`. A collective.
    """
    asked = run.config.batch.fuse
    if asked == 1 or run.config.fuse_refusal():
        return 1
    if run.ranks.device.type not in ("cpu", "cuda"):
        if asked == "auto":
            return 1
        raise ConfigError("batch.fuse", f"{asked} needs a CPU or a CUDA device; {ALONE}")
    step = run.plan.step(0)
    limit = len(step.micro_batches) if asked == "auto" else asked
    own = [group for rank in range(run.plan.ranks) for group in run.plan.groups(step, rank, limit)]
    first, last = max(own, key=lambda group: group[1] - group[0])
    if last - first == 1:
        return 1  # no rank has two micro-batches to run at once
    run.module.train()
    try:
        _prove(run, step, first)
    except ConfigError as error:
        if asked != "auto":
            raise
        run.alone = error.message.partition(", so ")[0].partition("; ")[0]
        return 1
    return asked if asked != "auto" else min(run.ranks.gather([_largest_that_fits(run, step, first, last)]))


def _prove(run: Run, step: Step, place: int) -> None:
    """Run two micro-batches, cut to a few samples, one by one and at once: loss, gradient and buffers must agree."""
    ids = [run.plan.sample_ids(step, p)[:FEW] for p in (place, place + 1)]
    size = len(ids[0])
    step = step._replace(micro_batches=[(i * size, (i + 1) * size) for i in range(place + 2)])
    loader, dtype = run.train_loader, run.precision.dtype
    one_by_one = [loader.peek(ids[i], place + i) for i in (0, 1)]
    at_once = [loader.peek([*ids[0], *ids[1]], place, 2)]
    exact = Precision("fp64" if dtype == torch.float64 else "fp32", run.ranks.device)  # autocast rounds too much
    forward = Forward(run.task, exact, run.ranks.device, run.config.run.seed)
    due = _outcome(run, forward, step, one_by_one)
    try:
        got = _outcome(run, forward, step, at_once)
    except RuntimeError as error:  # as from activation checkpointing, which runs layers again behind our back
        cause = str(error).splitlines()[0]
        raise ConfigError("batch.fuse", f"two micro-batches fail in one forward ({cause}); {ALONE}") from None
    wrong = [name for name in due if not _close(got[name], due[name], TOLERANCE[dtype])]
    if wrong:
        raise ConfigError(
            "batch.fuse",
            f"two micro-batches in one forward do not give what they give one by one "
            f"(different: {', '.join(wrong[:5])}), "
            f"so some part of the model or the loss looks at more than one sample; {ALONE}",
        )


def _outcome(run: Run, forward: Forward, step: Step, batches: list[MicroBatch]) -> dict[str, Tensor]:
    """What some forwards and backwards come to."""
    with _untouched(run):
        losses = []
        for batch in batches:
            _, loss, weight = forward(run.module, batch, step)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(torch.stack([loss.detach(), torch.as_tensor(weight, dtype=loss.dtype, device=loss.device)]))
        gradients = [p.grad.flatten() for p in run.module.parameters() if p.grad is not None]
        buffers = {f"buffer {name}": buffer.clone() for name, buffer in run.module.named_buffers()}
        return {"the loss": torch.stack(losses).sum(0), "the gradient": torch.cat(gradients), **buffers}


def _close(got: Tensor, due: Tensor, tolerance: float) -> bool:
    """Whether two tensors are the same but for rounding; NaN is as good as NaN."""
    if got.shape != due.shape:
        return False
    error, size = (torch.linalg.vector_norm(t.to(due.dtype).double()) for t in (got - due, due))
    return not bool(error > tolerance * size)


@contextmanager
def _untouched(run: Run) -> Iterator[None]:
    """Leave the model's buffers and gradients and all generators as they were, whatever happens in between."""
    module, generator = run.module, device_generator(run.ranks.device)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    gradients = [(p, p.grad) for p in module.parameters()]
    module.zero_grad()
    drawn = generator.get_state()
    try:
        with preserved_cpu_generators():
            yield
    finally:
        generator.set_state(drawn)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


# ---------------------------------------------------------------- what fits


def _largest_that_fits(run: Run, step: Step, first: int, last: int) -> int:
    """The largest group from `first` on that a forward and backward have memory for, halved until one does."""
    count = last - first
    if run.ranks.device.type == "cpu":  # where memory runs out, the process is killed: nothing is raised to catch
        count = max(1, min(count, _room() // max(1, _bytes_of_one(run, step, first))))
    while count > 1 and not _fits(run, step, first, count):
        count //= 2
    return count


def _fits(run: Run, step: Step, first: int, count: int) -> bool:
    try:
        with _untouched(run):
            kept_free = _optimizer_to_come(run)
            batch = run.train_loader.peek(run.plan.sample_ids(step, first, first + count), first, count)
            _, loss, _ = run.forward(run.module, batch, step)
            loss.backward()  # type: ignore[no-untyped-call]
            del kept_free
    except torch.OutOfMemoryError:
        fits = False  # and out of the handler, whose traceback holds what the try allocated
    else:
        fits = True
    gc.collect()
    torch.cuda.empty_cache()
    return fits


def _optimizer_to_come(run: Run) -> list[Tensor]:
    """As much memory as an Adam makes in the first step."""
    return [torch.empty_like(p) for p in run.module.parameters() if p.requires_grad for _ in range(2)]


def _bytes_of_one(run: Run, step: Step, place: int) -> int:
    """What one micro-batch's forward keeps for its backward, twice: gradients of activations are as large."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in run.module.parameters()}
    with _untouched(run), saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = run.train_loader.peek(run.plan.sample_ids(step, place), place)
        graph = run.forward(run.module, batch, step)
        del graph
    return 2 * sum(size for pointer, size in kept.items() if pointer not in weights)


def _room() -> int:
    """Bytes of main memory for one rank: half of what is available, shared by the node's ranks."""
    import psutil  # type: ignore[import-untyped]

    available = int(psutil.virtual_memory().available)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and limit.read_text().strip().isdecimal():  # a container's own limit
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
