"""Modules that would train as something else than they seem to be, refused before they are moved to the device."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError


def refuse_untrainable(module: nn.Module, key: str, dtype: torch.dtype) -> None:
    """Raise `ConfigError`, at `key` unless another one is at fault, for what cannot be trained as it is meant.

    That is TorchScript, tensors of torch.inference_mode or without values, parameters that share memory by `data`
    alone, and complex numbers in fp64, the run's `dtype`.
    """
    _refuse_scripted(module, key)
    _refuse_meta(module, key)
    _refuse_inference(module, key)
    _refuse_shared_memory(module, key)
    if dtype == torch.float64:
        _refuse_complex(module)


def _refuse_scripted(module: nn.Module, key: str) -> None:
    """TorchScript keeps parameters and buffers in C++, and shows no layer as what it was, such as a BatchNorm.

    A scripted function, or a scripted module without tensors, is computed as any other.
    """
    for name, part in module.named_modules():
        if not isinstance(part, torch.jit.ScriptModule):
            continue
        if any(True for _ in chain(part.parameters(), part.buffers())):
            where = f'"{name}"' if name else "it"
            raise ConfigError(
                key,
                f"{where} is TorchScript (torch.jit.script or torch.jit.trace), whose layers cannot be told apart; "
                f"give the module that it was made of, and use train.compile for speed",
            )


def _refuse_meta(module: nn.Module, key: str) -> None:
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(
                key,
                f'"{name}" is on the meta device, where a tensor has no values; make the model outside of '
                f'torch.device("meta"), or give it values before: model.to_empty(device="cpu"), and then weights',
            )


def _refuse_inference(module: nn.Module, key: str) -> None:
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_inference():
            raise ConfigError(
                key,
                f'"{name}" was made within torch.inference_mode, and can take no part in training; make the model '
                f"outside of it",
            )


def _refuse_shared_memory(module: nn.Module, key: str) -> None:
    """Weights tied by `a.data = b.data` are parted by a move to a GPU or to another dtype, and not on one CPU."""
    names: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        address = _address(tensor)
        if address is None:
            continue
        first_name, first = names.setdefault(address, (name, tensor))
        if first is tensor or not (first.requires_grad or tensor.requires_grad):
            continue
        raise ConfigError(
            key,
            f'"{first_name}" and "{name}" share their memory but are two tensors, which a GPU or another dtype '
            f"would part; tie parameters as one object (`b.weight = a.weight`), or give each its own by `.clone()`",
        )


def _refuse_complex(module: nn.Module) -> None:
    """In fp64 they have 128 bits, for which safetensors has no name."""
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_complex():
            raise ConfigError(
                "train.precision",
                f'fp64 makes complex128 of "{name}", which no checkpoint can hold; use fp32, or hold it as real '
                f"numbers, by torch.view_as_real",
            )


def _address(tensor: Tensor) -> int | None:
    """Where the elements begin; None for what has none, or of a kind that need not say."""
    is_plain = type(tensor.data) is Tensor and tensor.layout == torch.strided
    if not is_plain or tensor.is_meta or not tensor.numel():
        return None
    return tensor.data_ptr()
