"""What differs between kinds of device: the CPU, CUDA (which is also ROCm's name in torch), XPU and MPS.

All of them take the same path where torch allows it. What a kind cannot do is refused by name, with a way out.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from trainer.errors import ConfigError

# With streams beside the main one, and page-locked memory to copy from. MPS shares the host's memory.
KINDS_WITH_STREAMS = ("cuda", "xpu")
# Those whose kernels torch can be asked to make deterministic, and that have been audited.
DETERMINISTIC_KINDS = ("cpu", "cuda")
KINDS_WITHOUT_FP64 = ("mps",)
# One device a machine, without collective operations.
KINDS_OF_ONE_PROCESS = ("mps",)

ON_THE_CPU = "run on the CPU, with ACCELERATE_USE_CPU=true in the environment"


def device_module(device: torch.device) -> Any:
    """`torch.cuda`, `torch.xpu` or `torch.mps`: streams, generators and memory of a kind of device."""
    return torch.get_device_module(device)


def chosen_kind() -> str:
    """The kind of device that Accelerate takes, before a process has joined the others."""
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if wants_cpu or not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def device_name(device: torch.device) -> str:
    """A GPU's model; the kind where torch knows no name."""
    if device.type not in KINDS_WITH_STREAMS:
        return device.type
    return str(device_module(device).get_device_name(device))


def total_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's own memory; None where it is the host's."""
    if device.type not in KINDS_WITH_STREAMS:
        return None
    return int(device_module(device).get_device_properties(device).total_memory)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over many samples: fp64 where the device has it."""
    return torch.float32 if device.type in KINDS_WITHOUT_FP64 else torch.float64


def default_generator(device: torch.device) -> torch.Generator | None:
    """The generator from which dropout on `device` draws; None for a kind of device that is not known."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    if device.type not in KINDS_WITH_STREAMS:
        return None
    module = device_module(device)
    index = module.current_device() if device.index is None else device.index
    generators: tuple[torch.Generator, ...] = module.default_generators
    return generators[index]


def generators_in_use() -> list[torch.Generator]:
    """The default generators of the GPUs that this process has used. A GPU that it has not used stays so."""
    generators = []
    for kind in KINDS_WITH_STREAMS:
        module = device_module(torch.device(kind))
        if module.is_initialized():
            generators.append(module.default_generators[module.current_device()])
    if torch.backends.mps.is_available():
        generators.append(torch.mps._get_default_mps_generator())
    return generators


# ---------------------------------------------------------------- what a kind cannot do


def check_process_count(kind: str, count: int) -> None:
    """Raise `ConfigError` for several processes on a kind of device that has no collective operations."""
    if count > 1 and kind in KINDS_OF_ONE_PROCESS:
        raise ConfigError(
            "WORLD_SIZE",
            f"{count} processes were launched, and torch has no collective operations on {kind}; start one, or "
            f"{ON_THE_CPU}",
        )


def check_precision(kind: str, precision: str) -> None:
    """Raise `ConfigError` for a precision that a kind of device lacks."""
    if precision == "fp64" and kind in KINDS_WITHOUT_FP64:
        raise ConfigError(
            "train.precision",
            f"{kind} has no fp64; use fp32, or {ON_THE_CPU}",
        )


def check_reproducibility(kind: str, reproducibility: str) -> None:
    """Raise `ConfigError` for bitwise mode where nobody knows which kernels are deterministic."""
    if reproducibility == "bitwise" and kind not in DETERMINISTIC_KINDS:
        raise ConfigError(
            "run.reproducibility",
            f"bitwise needs deterministic kernels, which torch cannot be relied on to choose on {kind}; use standard, "
            f"or {ON_THE_CPU}",
        )


def check_fp64_analysis(device: torch.device) -> None:
    """Raise `ConfigError` where a command that takes a step apart cannot compute in fp64."""
    if device.type in KINDS_WITHOUT_FP64:
        raise ConfigError(
            "device",
            f"{device.type} has no fp64, in which a step is taken apart; {ON_THE_CPU}",
        )
