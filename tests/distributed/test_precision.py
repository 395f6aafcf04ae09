"""bf16, fp16 and their ranks; a schedule that overflowed steps do not hold up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    Images,
    Points,
    config,
    conv_net,
    fitted,
    largest_difference,
    mlp,
    state,
)
from trainer import Trainer
from trainer.reporting.jsonl import read_rows


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_fp32_and_equal_over_ranks(
    tmp_path: Path, precision: str
) -> None:
    def run(
        directory: Path, precision: str
    ) -> tuple[dict[str, Tensor], list[torch.dtype]]:
        model, dtypes = conv_net(), []
        model[0].register_forward_hook(
            lambda module, inputs, output: dtypes.append(output.dtype)
        )
        settings = config(
            directory,
            batch__micro_size=7,
            train__precision=precision,
            train__max_grad_norm=1.0,
        )
        trainer = fitted(settings, model, train_data=Images(103), val_data=Images(20))
        return state(trainer), dtypes

    ((exact, _),) = on_ranks(1, run, tmp_path / "fp32", "fp32")
    ((reference, dtypes),) = on_ranks(1, run, tmp_path / "1", precision)
    assert set(dtypes) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    # Weights stay fp32.
    assert all(t.dtype is not dtypes[0] for t in reference.values())
    assert 0 < largest_difference(reference, exact) < 0.1
    for weights, _ in on_ranks(3, run, tmp_path / "3", precision):
        assert largest_difference(weights, reference) < (
            2e-2 if precision == "bf16" else 5e-3
        )


class Explodes(nn.Module):
    """Its gradients overflow in some steps."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__()
        self.net, self.steps, self.calls = mlp(), steps, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        out: Tensor = self.net(x)
        if self.training and self.calls in self.steps:
            out.register_hook(lambda gradient: gradient * 1e30)
        return out


def test_a_skipped_step_does_not_hold_up_the_schedule(tmp_path: Path) -> None:
    """The epoch's last step overflows: its learning rate falls all the same, and its update is not made."""

    def run(directory: Path) -> tuple[list[float], float, bool]:
        settings = config(
            directory,
            train__precision="fp16",
            train__epochs=3,
            schedule__name="step",
            schedule__step_size=1,
            optimizer__momentum=0.0,
        )
        data = Points(56, ignored=False)
        trainer = Trainer(settings, model=Explodes([2]), train_data=data, val_data=data)
        weights = [p.detach().clone() for p in trainer.module.parameters()]
        after: list[list[Tensor]] = []
        step = trainer.run.precision.step

        def spied(optimizer: torch.optim.Optimizer) -> None:
            step(optimizer)
            after.append([p.detach().clone() for p in trainer.module.parameters()])

        trainer.run.precision.step = spied  # type: ignore[method-assign]
        trainer.fit()
        assert trainer.run.precision.scaler is not None
        unchanged = all(
            torch.equal(a, b) for a, b in zip(after[0], after[1], strict=True)
        )
        moved = not torch.equal(after[0][0], weights[0]) and not torch.equal(
            after[2][0], after[1][0]
        )
        lrs = [
            row["lr"]
            for row in read_rows(directory / "run" / "metrics.jsonl")
            if "train/loss" in row
        ]
        return lrs, trainer.run.precision.scaler.get_scale(), unchanged and moved

    for lrs, scale, skipped in on_ranks(1, run, tmp_path):
        assert lrs == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
        assert scale == 2.0**15  # halved once
        assert skipped


def test_fp64_is_fp64_throughout(tmp_path: Path) -> None:
    def run(directory: Path) -> set[Any]:
        dtypes = set()
        model = conv_net()
        model[0].register_forward_hook(
            lambda module, inputs, output: dtypes.update(
                {inputs[0].dtype, output.dtype}
            )
        )
        trainer = fitted(
            config(directory), model, train_data=Images(28), val_data=Images(20)
        )
        return dtypes | {
            t.dtype
            for t in trainer.module.state_dict().values()
            if t.is_floating_point()
        }

    assert on_ranks(1, run, tmp_path) == [{torch.float64}]
