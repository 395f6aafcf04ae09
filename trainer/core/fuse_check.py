"""Before training: how many micro-batches share a forward, chosen and proved by trial runs that leave no trace."""

from __future__ import annotations

import gc
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
from trainer.exact.fuse import REMEDY
from trainer.exact.plan import IndexRange, Step
from trainer.exact.seeding import device_generator, preserved_cpu_generators
from trainer.process import launcher

PROOF_SAMPLES = 4  # of each micro-batch: more of them would prove no more
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-2}  # rounding stays far below, other mathematics far above
MARGIN = 0.05  # of a GPU's memory
CGROUP = Path("/sys/fs/cgroup")


def choose_fuse(run: Run) -> tuple[int, str]:
    """The number of micro-batches in one forward, and why `auto` is 1 where it is: the same on every rank.

    A number that the config asks for is proved right; `auto` is the largest that fits in memory. Where several
    micro-batches in one forward do not give what they give one by one, `auto` is 1, and a number raises
    `ConfigError`. A collective.
    """
    asked = run.config.batch.fuse
    if asked == 1 or run.config.fuse_refusal():
        return 1, ""
    if run.ranks.device.type not in ("cpu", "cuda"):
        if asked == "auto":
            return 1, ""
        raise ConfigError("batch.fuse", f"{asked} needs a CPU or a CUDA device; {REMEDY}")
    step = run.plan.step(0)
    limit = len(step.micro_batches) if asked == "auto" else asked
    first, last = _largest_group(run, step, limit)
    if last - first == 1:
        return 1, ""  # no rank has two micro-batches to run at once
    run.module.train()
    try:
        _prove(run, step, first)
    except ConfigError as error:
        if asked != "auto":
            raise
        return 1, error.message.partition(", so ")[0].partition("; ")[0]
    if asked != "auto":
        return asked, ""
    return min(run.ranks.gather([_largest_that_fits(run, step, first, last)])), ""


def _largest_group(run: Run, step: Step, limit: int) -> IndexRange:
    """The largest range of micro-batches that any rank would run at once."""
    groups: list[IndexRange] = []
    for rank in range(run.plan.ranks):
        groups += run.plan.groups(step, rank, limit)
    return max(groups, key=lambda group: group[1] - group[0])


# ---------------------------------------------------------------- the proof


def _prove(run: Run, step: Step, index: int) -> None:
    """Run two micro-batches, cut to a few samples, one by one and at once: loss, gradient and buffers must agree."""
    first_ids = run.plan.sample_ids(step, index)[:PROOF_SAMPLES]
    second_ids = run.plan.sample_ids(step, index + 1)[:PROOF_SAMPLES]
    size = len(first_ids)
    ranges = [(number * size, (number + 1) * size) for number in range(index + 2)]
    step = step._replace(micro_batches=ranges)
    loader = run.train_loader
    one_by_one = [loader.peek(first_ids, index), loader.peek(second_ids, index + 1)]
    at_once = [loader.peek([*first_ids, *second_ids], index, 2)]

    dtype = run.precision.dtype
    exact = Precision("fp64" if dtype == torch.float64 else "fp32", run.ranks.device)  # autocast rounds too much
    forward = Forward(run.task, exact, run.ranks.device, run.config.run.seed)
    expected = _results(run, forward, step, one_by_one)
    try:
        actual = _results(run, forward, step, at_once)
    except RuntimeError as error:
        # As from activation checkpointing, which runs layers again outside the forward.
        cause = str(error).splitlines()[0]
        raise ConfigError("batch.fuse", f"two micro-batches fail in one forward ({cause}); {REMEDY}") from None
    different = [name for name in expected if not _is_close(actual[name], expected[name], TOLERANCE[dtype])]
    if different:
        raise ConfigError(
            "batch.fuse",
            f"two micro-batches in one forward do not give what they give one by one "
            f"(different: {', '.join(different[:5])}), "
            f"so some part of the model or the loss looks at more than one sample; {REMEDY}",
        )


def _results(run: Run, forward: Forward, step: Step, batches: list[MicroBatch]) -> dict[str, Tensor]:
    """Loss, gradient and buffers after some forwards and backwards."""
    with without_trace(run):
        losses = []
        for batch in batches:
            _, loss = forward(run.module, batch, step)
            loss.total.backward()  # type: ignore[no-untyped-call]
            total = loss.total.detach()
            losses.append(torch.stack([total, torch.as_tensor(loss.weight, dtype=total.dtype, device=total.device)]))
        gradients = [p.grad.flatten() for p in run.module.parameters() if p.grad is not None]
        results = {"the loss": torch.stack(losses).sum(0), "the gradient": torch.cat(gradients)}
        for name, buffer in run.module.named_buffers():
            results[f"buffer {name}"] = buffer.clone()
        return results


def _is_close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """True if two tensors are the same but for rounding. NaN counts as close: `>` is false for it."""
    if actual.shape != expected.shape:
        return False
    difference = torch.linalg.vector_norm((actual - expected).to(expected.dtype).double())
    return not bool(difference > tolerance * torch.linalg.vector_norm(expected.double()))


@contextmanager
def without_trace(run: Run) -> Iterator[None]:
    """Leave the model's buffers and gradients and all generators as they were, whatever happens in between."""
    module, generator = run.module, device_generator(run.ranks.device)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    module.zero_grad()
    generator_state = generator.get_state()
    try:
        with preserved_cpu_generators():
            yield
    finally:
        generator.set_state(generator_state)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


# ---------------------------------------------------------------- what fits in memory


def _largest_that_fits(run: Run, step: Step, first: int, last: int) -> int:
    """The largest group from `first` on that a forward and backward have memory for, halved until one does."""
    count = last - first
    if run.ranks.device.type == "cpu":
        # Where main memory runs out, the process is killed: there is no error to catch.
        count = max(1, min(count, _available_memory() // max(1, _memory_of_one(run, step, first))))
    while count > 1 and not _fits(run, step, first, count):
        count //= 2
    return count


def _fits(run: Run, step: Step, first: int, count: int) -> bool:
    try:
        with without_trace(run):
            ids = run.plan.sample_ids(step, first, first + count)
            batch = run.train_loader.peek(ids, first, count)
            batch_ahead = run.train_loader.peek(ids, first, count)  # copied while this one is computed
            reserved = [*_memory_of_an_optimizer(run), _margin(run.ranks.device)]
            _, loss = run.forward(run.module, batch, step)
            loss.total.backward()  # type: ignore[no-untyped-call]
            del reserved, batch_ahead
    except torch.OutOfMemoryError:
        fits = False  # the handler ends here: its traceback holds what the trial allocated
    else:
        fits = True
    gc.collect()
    torch.cuda.empty_cache()
    return fits


def _memory_of_an_optimizer(run: Run) -> list[Tensor]:
    """As much memory as an Adam allocates in the first step."""
    trained = [p for p in run.module.parameters() if p.requires_grad]
    return [torch.empty_like(parameter) for parameter in [*trained, *trained]]


def _margin(device: torch.device) -> Tensor:
    """A part of a GPU's memory for what the trial does not run: evaluation, metrics, NCCL, fragmentation."""
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
    return torch.empty(int(total * MARGIN), dtype=torch.uint8, device=device)


def _memory_of_one(run: Run, step: Step, index: int) -> int:
    """Bytes that one micro-batch's forward keeps for its backward, twice: gradients of activations are as large."""
    bytes_by_pointer: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        bytes_by_pointer[storage.data_ptr()] = storage.nbytes()
        return tensor

    with without_trace(run), saved_tensors_hooks(note, lambda tensor: tensor):
        batch = run.train_loader.peek(run.plan.sample_ids(step, index), index)
        graph = run.forward(run.module, batch, step)
        del graph
    for parameter in run.module.parameters():
        bytes_by_pointer.pop(parameter.untyped_storage().data_ptr(), None)
    return 2 * sum(bytes_by_pointer.values())


def _available_memory() -> int:
    """Bytes of main memory for one rank: half of what is available, shared by the ranks of the machine."""
    import psutil  # type: ignore[import-untyped]

    available = int(psutil.virtual_memory().available)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and limit.read_text().strip().isdecimal():  # a container's own limit
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available // (2 * launcher.local_world_size())
