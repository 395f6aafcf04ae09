"""The process-wide settings of a run, and clear errors for operations that cannot run under them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch

from trainer.errors import LockstepError
from trainer.exact.default_device import without_default_device
from trainer.exact.seeding import preserved_generators
from trainer.exact.tf32 import tf32 as tf32_policy

SUMMARY = "deterministic algorithms · no autotuning · 1 CPU thread a process"
# What else decides how torch computes, below `torch.backends`, as torch has it. A program may have its reasons.
DEFAULTS_OF_TORCH = {
    "mkldnn.enabled": True,
    "cudnn.enabled": True,
    "cuda.matmul.allow_fp16_reduced_precision_reduction": True,
    "cuda.matmul.allow_bf16_reduced_precision_reduction": True,
    "cuda.matmul.allow_fp16_accumulation": False,
}
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # read when cuBLAS starts
    # train.compile: no kernel is chosen by timing it.
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}
DEVICE_ASSERT = "device-side assert triggered"
NO_DETERMINISTIC_KERNEL = "does not have a deterministic implementation"


@contextmanager
def run_settings(
    *,
    bitwise: bool,
    compiled: bool,
    tf32: bool | None = None,
    cudnn_benchmark: bool | None = None,
) -> Iterator[None]:
    """A context with the settings that a run needs in its process. Those before come back at the end, also after an
    error; contexts may be nested.

    `tf32` and `cudnn_benchmark` are the keys of `train`. None leaves the process's own setting in standard mode; in
    bitwise mode it is torch's default, whatever the process had before.

    A run seeds the generators of its dropout and data over and over. They come back as well, so that what the caller
    draws after a run does not depend on it.
    """
    with ExitStack() as stack:
        stack.enter_context(_without_modes_of_the_caller())
        stack.enter_context(preserved_generators())
        if bitwise or tf32 is not None:
            stack.enter_context(tf32_policy(tf32))
        if cudnn_benchmark is not None:
            stack.enter_context(_cudnn_benchmark(cudnn_benchmark))
        if bitwise:
            stack.enter_context(_deterministic())
            if compiled:
                stack.enter_context(_one_kernel_a_shape())
        yield


def describe_settings() -> str:
    """The settings of a bitwise run in words, with those that the program has made: another one may get other bits."""
    parts = [SUMMARY]
    for name, default in DEFAULTS_OF_TORCH.items():
        value = attrgetter(name)(torch.backends)
        if value != default:
            parts.append(f"torch.backends.{name}={value}, by the program")
    return " · ".join(parts)


@contextmanager
def _without_modes_of_the_caller() -> Iterator[None]:
    """Gradients on, no autocast, and floats of 32 bits on the CPU unless somebody asks for others.

    A run is a function of its config, and processes that it starts would not have these modes.
    """
    kinds = {"cpu"}
    if torch.accelerator.is_available():
        kinds.add(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_outside_autocast(kinds))
        stack.enter_context(without_default_device())
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def _outside_autocast(kinds: Iterable[str]) -> Iterator[None]:
    """As if the caller used no autocast on these kinds of devices.

    `torch.autocast(…, enabled=False)` would not do: torch drops the weights that it has cast when the outermost
    autocast ends. Within one, a run in bf16 would compute with those of its first step for ever.
    """
    were_on = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    for kind in were_on:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind, was_on in were_on.items():
            torch.set_autocast_enabled(kind, was_on)
        for _ in range(depth):
            torch.autocast_increment_nesting()


@contextmanager
def _deterministic() -> Iterator[None]:
    """The settings under which one kind of device and one software stack always give the same bits.

    See https://docs.pytorch.org/docs/stable/notes/randomness.html.
    """
    threads = torch.get_num_threads()
    mkldnn: Any = torch.backends.mkldnn
    flags: list[tuple[Any, str, object]] = [
        (torch.backends.cudnn, "benchmark", False),
        (torch.backends.cudnn, "deterministic", True),
        # Filling what is about to be overwritten changes no bit, and costs a kernel for every tensor.
        (torch.utils.deterministic, "fill_uninitialized_memory", False),
        # On processors that have such products, `set_float32_matmul_precision` goes for the CPU, too.
        (mkldnn.matmul, "fp32_precision", "ieee"),
        (mkldnn.conv, "fp32_precision", "ieee"),
        (mkldnn.rnn, "fp32_precision", "ieee"),
    ]
    before = [getattr(owner, name) for owner, name, _ in flags]
    with _environment(ENVIRONMENT), deterministic_algorithms(), _with_denormals():
        try:
            for owner, name, value in flags:
                setattr(owner, name, value)
            # Threads split a CPU kernel's sums, and launchers give one process more of them than each of several.
            torch.set_num_threads(1)
            yield
        finally:
            for (owner, name, _), value in zip(flags, before, strict=True):
                setattr(owner, name, value)
            torch.set_num_threads(threads)


@contextmanager
def _with_denormals() -> Iterator[None]:
    """A context in which this thread's numbers may be smaller than the smallest normal one.

    The caller may have set that to zero, and so does many a library as it is loaded.
    """
    were_zero = sys.float_info.min / 2 == 0
    if were_zero:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if were_zero:
            torch.set_flush_denormal(True)


@contextmanager
def _cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """A context in which cuDNN times its algorithms for each new shape, or does not."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def deterministic_algorithms(*, warn_only: bool = False) -> Iterator[None]:
    """A context in which torch refuses an operation without a deterministic kernel, or only warns of it."""
    enabled_before = torch.are_deterministic_algorithms_enabled()
    warn_only_before = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled_before, warn_only=warn_only_before)


@contextmanager
def _one_kernel_a_shape() -> Iterator[None]:
    """Make torch.compile fail instead of falling back to eager mode after a number of shapes.

    Which shapes a rank compiles first depends on the number of ranks, so a fallback would, too.
    """
    import torch._dynamo.config as dynamo  # imported here: it costs seconds

    before = dynamo.fail_on_recompile_limit_hit
    dynamo.fail_on_recompile_limit_hit = True
    try:
        yield
    finally:
        dynamo.fail_on_recompile_limit_hit = before


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """A context with `defaults` for the environment variables that the user has not set."""
    names = [name for name in defaults if name not in os.environ]
    for name in names:
        os.environ[name] = defaults[name]
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def refused_operation(error: RuntimeError) -> LockstepError | None:
    """An error that says what to do, if a device refused an operation or its input; None for any other error."""
    message = str(error)
    if DEVICE_ASSERT in message:
        # CUDA reports this asynchronously, so the operation is not known, and the device is unusable afterwards.
        return LockstepError(
            "a CUDA kernel refused what it was given, most often a target that is no class of the model; the CPU says "
            "which: the same command with CUDA_VISIBLE_DEVICES= before it"
        )
    if NO_DETERMINISTIC_KERNEL not in message:
        return None
    operation = message.split(NO_DETERMINISTIC_KERNEL, maxsplit=1)[0].strip()
    return LockstepError(
        f"{operation} has no deterministic kernel on this device, so run.reproducibility=bitwise cannot hold; "
        f"replace the operation in the model or loss, or use run.reproducibility=standard"
    )
