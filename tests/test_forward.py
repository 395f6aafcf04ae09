"""What a model draws is a function of the seed, the step and the micro-batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.components.task import build_task
from trainer.config.model_sections import LossConfig
from trainer.core.forward import Forward
from trainer.core.precision import Precision
from trainer.data.batches import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.plan import Plan, Step

CPU = torch.device("cpu")


def mask(seed: int, step_number: int, place: int) -> Tensor:
    """What dropout leaves of a micro-batch of ones."""
    step = Plan(
        samples=40, batch_size=20, micro_size=5, ranks=1, epochs=9, seed=0
    ).step(step_number - 1)
    forward = Forward(build_task(LossConfig(), 8), Precision("fp32", CPU), CPU, seed)
    batch = MicroBatch(place, torch.ones(5, 8), torch.zeros(5, dtype=torch.long))
    output: Tensor = forward(nn.Dropout(0.5), batch, step)[0]
    return output


def test_dropout_is_new_in_each_step_micro_batch_and_seed_and_else_the_same() -> None:
    reference = mask(0, 3, 1)
    assert torch.equal(mask(0, 3, 1), reference)
    for other in (mask(1, 3, 1), mask(0, 4, 1), mask(0, 3, 2)):
        assert not torch.equal(other, reference)


def test_one_value_has_no_variance() -> None:
    step = Plan(samples=3, batch_size=3, micro_size=1, ranks=1, epochs=1, seed=0).step(
        0
    )
    forward = Forward(build_task(LossConfig(), 4), Precision("fp32", CPU), CPU, 0)
    batch = MicroBatch(0, torch.ones(1, 4), torch.zeros(1, dtype=torch.long))
    with pytest.raises(
        ConfigError,
        match=r"batch\.micro_size: a micro-batch of one sample leaves BatchNorm one value",
    ):
        forward(nn.BatchNorm1d(4), batch, step)


class LayerDrop(nn.Module):
    """Leaves a layer out by a draw on the host, as models on GPUs do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(1)


@pytest.mark.parametrize("fused", [1, 2])
def test_draws_on_the_host_are_keyed_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, fused: int
) -> None:
    """Whatever was drawn before. Draws on the host for several micro-batches at once are refused."""
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    gpu = torch.device("cuda", 0)
    forward = Forward(build_task(LossConfig(), 8), Precision("fp32", CPU), gpu, 0)
    batch = MicroBatch(
        0, torch.ones(5 * fused, 8), torch.zeros(5 * fused, dtype=torch.long), fused
    )
    step = Plan(
        samples=40, batch_size=20, micro_size=5, ranks=1, epochs=9, seed=0
    ).step(0)
    if fused > 1:
        with pytest.raises(
            ConfigError,
            match=r"batch\.fuse: the model or the loss draws random numbers",
        ):
            forward(LayerDrop(), batch, step)
        return
    outputs = []
    for _ in range(2):
        torch.rand(3)
        outputs.append(forward(LayerDrop(), batch, step)[0])
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], draw_on_cpu(batch, step))


def draw_on_cpu(batch: MicroBatch, step: Step) -> Tensor:
    output: Tensor = Forward(
        build_task(LossConfig(), 8), Precision("fp32", CPU), CPU, 0
    )(LayerDrop(), batch, step)[0]
    return output
