"""Before training: how many micro-batches share a forward, chosen and checked by forwards that leave no trace."""

from __future__ import annotations

import gc

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainer.core.forward import Forward
from trainer.core.joint_loss import loss_adds_up
from trainer.core.precision import Precision, check_gradient
from trainer.core.proof.state import without_trace
from trainer.core.run import Run
from trainer.core.whole_step import loss_by_sample
from trainer.data.batches import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.fuse import REMEDY
from trainer.exact.host_draws import mentions_host_generators
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.moving_buffers import Copies, other_buffers
from trainer.exact.plan import IndexRange, Step, split_evenly
from trainer.process.device import KINDS_WITH_STREAMS, device_module
from trainer.process.free_memory import share_of_main_memory

SAMPLES_TO_COMPARE = 4  # of each micro-batch: more of them would show no more
# Rounding stays far below, other mathematics far above.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-2}
MARGIN = 0.05  # of a GPU's memory
NAMES_IN_A_MESSAGE = 5


def choose_fuse(run: Run) -> tuple[int, str]:
    """The number of micro-batches in one forward, and why `auto` is 1 where it is: the same on every rank.

    `auto` is the largest number that fits in memory. Where several micro-batches in one forward do not give what they
    give one by one, `auto` is 1, and any other setting raises `ConfigError`. A collective.
    """
    fuse = run.config.batch.fuse
    is_auto = fuse == "auto"
    if fuse == 1 or run.config.fuse_refusal():
        return 1, _note_on_collate(run) if is_auto else ""
    kind = run.ranks.device.type
    if kind not in ("cpu", *KINDS_WITH_STREAMS):
        if is_auto:
            return 1, ""
        raise ConfigError(
            "batch.fuse",
            f"{fuse} cannot be checked on {kind}; {REMEDY}",
        )
    step = run.plan.step(0)
    limit = len(step.micro_batches) if fuse == "auto" else fuse
    first, end = _largest_group(run, step, limit)
    if end - first == 1:
        return 1, ""  # no rank has two micro-batches to run at once
    run.module.train()
    if fuse != "auto":
        run.ranks.on_each(lambda: _check_two_micro_batches(run, step, first))
        return fuse, ""
    # Each rank may find another answer, by its memory, or by rounding near the tolerance: none decides alone.
    own = _answer_of_this_rank(run, step, first, end)
    answers: list[tuple[int, str]] = run.ranks.gather([own])
    return min(answers)


def _note_on_collate(run: Run) -> str:
    collate = run.config.data.collate
    if collate is None:
        return ""
    return f"data.collate={collate} makes each batch anew"


def _answer_of_this_rank(run: Run, step: Step, first: int, end: int) -> tuple[int, str]:
    """How many micro-batches of `[first, end)` this rank can run at once, and why it is 1 where they do not agree."""
    try:
        _check_two_micro_batches(run, step, first)
    except ConfigError as error:
        return 1, _first_clause(error.message)
    if any(map(mentions_host_generators, (run.module, run.task))):
        # If not in the first step, then perhaps in a later one, which would end the run.
        return 1, "the model's or the loss's code mentions random or numpy.random"
    return _largest_that_fits(run, step, first, end), ""


def _first_clause(message: str) -> str:
    """What is wrong, without the conclusion and the remedy, which are for a config that asks for a number."""
    clause, _, _ = message.partition("; ")
    clause, _, _ = clause.partition(", so ")
    return clause


def _largest_group(run: Run, step: Step, limit: int) -> IndexRange:
    """The largest range of micro-batches that any rank would run at once."""
    groups: list[IndexRange] = []
    for rank in range(run.plan.ranks):
        groups += run.plan.groups(step, rank, limit)
    return max(groups, key=lambda group: group[1] - group[0])


# ---------------------------------------------------------------- the same result


def _check_two_micro_batches(run: Run, step: Step, first: int) -> None:
    """Run a few samples of two micro-batches one by one and at once: loss, gradient and buffers must agree."""
    ids = run.plan.sample_ids(step, first)[:SAMPLES_TO_COMPARE]
    next_ids = run.plan.sample_ids(step, first + 1)[:SAMPLES_TO_COMPARE]
    loader = run.train_loader
    one_by_one = [
        loader.peek(ids, first),
        loader.peek(next_ids, first + 1),
    ]
    at_once = [loader.peek([*ids, *next_ids], first, 2)]
    # A step that ends with the two, each of as many samples as are compared.
    count = first + 2
    micro_batches = split_evenly(count * len(ids), count)
    small_step = step._replace(micro_batches=micro_batches)

    device = run.ranks.device
    dtype = run.precision.dtype
    # Autocast rounds too much.
    precision_name = "fp64" if dtype == torch.float64 else "fp32"
    precision = Precision(precision_name, device)
    task = loss_by_sample(run.task)
    forward = Forward(task, precision, device, run.config.run.seed)
    expected = _results(run, forward, small_step, one_by_one)
    try:
        actual = _results(run, forward, small_step, at_once)
    except RuntimeError as error:
        # As from activation checkpointing, which runs layers again outside the forward.
        cause = str(error).splitlines()[0]
        raise ConfigError(
            "batch.fuse", f"two micro-batches fail in one forward ({cause}); {REMEDY}"
        ) from None
    with without_trace(run):
        adds_up = loss_adds_up(run.module, forward, small_step, one_by_one)
    differences = [] if adds_up else ["the loss of the same outputs"]
    for name, value in expected.items():
        if not _is_close(actual[name], value, TOLERANCE[dtype]):
            differences.append(name)
    if differences:
        names = ", ".join(differences[:NAMES_IN_A_MESSAGE])
        raise ConfigError(
            "batch.fuse",
            f"two micro-batches in one forward do not give what they give one by one (different: {names}), "
            f"so some part of the model or the loss looks at more than one sample; {REMEDY}",
        )


def _results(
    run: Run, forward: Forward, step: Step, batches: list[MicroBatch]
) -> dict[str, Tensor]:
    """Loss, gradient and buffers after some forwards and backwards."""
    whole = ModelAndLoss(run.module, run.task)
    start = Copies(other_buffers(whole))
    with without_trace(run):
        losses = []
        for batch in batches:
            start.restore()  # as in training: see `trainer.exact.moving_buffers`
            _, (total, weight) = forward(run.module, batch, step)
            check_gradient(total)
            total.backward()  # type: ignore[no-untyped-call]
            weight = torch.as_tensor(weight).to(total)
            losses.append(torch.stack([total.detach(), weight]))
        gradients = []
        for parameter in whole.parameters():
            if parameter.grad is not None:
                gradients.append(parameter.grad.flatten())
        results = {
            "the loss": torch.stack(losses).sum(0),
            "the gradient": torch.cat(gradients),
        }
        for name, buffer in whole.named_buffers():
            results[f"buffer {name}"] = buffer.clone()
        return results


def _is_close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """True if two tensors are equal up to rounding. NaN counts as close: `>` is false for it."""
    if actual.shape != expected.shape:
        return False
    if expected.dtype == torch.bool:
        return torch.equal(actual, expected)
    difference = (actual - expected).to(expected.dtype).double().norm()
    bound = tolerance * expected.double().norm()
    return not bool(difference > bound)


# ---------------------------------------------------------------- what fits in memory


def _largest_that_fits(run: Run, step: Step, first: int, end: int) -> int:
    """How many micro-batches from `first` on fit into memory for a forward and backward; halved until they do."""
    count = end - first
    if run.ranks.device.type == "cpu":
        # A process that runs out of main memory is killed: there is no error to catch.
        fitting = share_of_main_memory() // max(1, _memory_of_one(run, step, first))
        count = max(1, min(count, fitting))
    while count > 1 and not _fits(run, step, first, count):
        count //= 2
    return count


def _fits(run: Run, step: Step, first: int, count: int) -> bool:
    try:
        with without_trace(run):
            ids = run.plan.sample_ids(step, first, first + count)
            batch = run.train_loader.peek(ids, first, count)
            # Copied while this one is computed.
            batch_ahead = run.train_loader.peek(ids, first, count)
            # Held by name until the backward has run: what training will hold by then.
            reserved = [*_memory_of_an_optimizer(run), _margin(run.ranks.device)]
            _, loss = run.forward(run.module, batch, step)
            loss.total.backward()  # type: ignore[no-untyped-call]
            del reserved, batch_ahead
    except torch.OutOfMemoryError:
        # The handler must end before memory is freed: its traceback refers to the activations.
        fits = False
    else:
        fits = True
    gc.collect()
    torch.accelerator.empty_cache()
    return fits


def _memory_of_an_optimizer(run: Run) -> list[Tensor]:
    """As much memory as Adam allocates in its first step: two tensors for each parameter."""
    tensors = []
    for parameter in run.module.parameters():
        if parameter.requires_grad:
            tensors += [torch.empty_like(parameter), torch.empty_like(parameter)]
    return tensors


def _margin(device: torch.device) -> Tensor:
    """A part of a GPU's memory for what the trial does not run: evaluation, metrics, NCCL, fragmentation."""
    total = 0
    if device.type in KINDS_WITH_STREAMS:
        _, total = device_module(device).mem_get_info(device)
    return torch.empty(int(total * MARGIN), dtype=torch.uint8, device=device)


def _memory_of_one(run: Run, step: Step, index: int) -> int:
    """Bytes that one micro-batch's forward saves for its backward, twice: gradients of activations are as large."""
    bytes_by_pointer: dict[int, int] = {}

    def measure(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        bytes_by_pointer[storage.data_ptr()] = storage.nbytes()
        return tensor

    with without_trace(run), saved_tensors_hooks(measure, lambda tensor: tensor):
        ids = run.plan.sample_ids(step, index)
        batch = run.train_loader.peek(ids, index)
        graph = run.forward(run.module, batch, step)
        del graph  # within the context, whose hooks its tensors came through
    # Saved, too, and there however many micro-batches run at once.
    for parameter in run.module.parameters():
        pointer = parameter.untyped_storage().data_ptr()
        bytes_by_pointer.pop(pointer, None)
    return 2 * sum(bytes_by_pointer.values())
