"""Gradients by autograd's engine alone, beside those of `torch.autograd.backward`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from benchmarks.gpu.check import Answer, Setting
from trainer.components.models import small_cnn
from trainer.core import autograd_engine
from trainer.exact.determinism import run_settings

MICRO_BATCHES = 4


def by_the_engine(setting: Setting) -> Answer:
    """The gradients of some micro-batches, added up in bitwise mode: the same bits both ways."""
    torch.manual_seed(0)
    model = small_cnn(10).to(setting.device)
    inputs = torch.randn(MICRO_BATCHES, 16, 1, 8, 8, device=setting.device)
    scale = torch.tensor(1 / 64, device=setting.device)
    gradients: list[list[Tensor]] = []
    with run_settings(bitwise=True, compiled=False):
        for backward in (autograd_engine.backward, torch.autograd.backward):
            copied = copy.deepcopy(model)
            for images in inputs:
                backward(copied(images).square().sum(), scale)
            found = [p.grad for p in copied.parameters() if p.grad is not None]
            gradients.append(found)
    ours, torchs = gradients
    pairs = zip(ours, torchs, strict=True)
    is_same = all(torch.equal(mine, other) for mine, other in pairs)
    is_used = autograd_engine._engine() is not None
    way = (
        "the engine alone"
        if is_used
        else "torch's function, as this torch has no other"
    )
    return Answer(
        f"by {way}: {len(ours)} gradients, {'the same' if is_same else 'NOT the same'} bits",
        {"gradients": len(ours), "uses_engine": is_used},
        passed=is_same and is_used,
    )
