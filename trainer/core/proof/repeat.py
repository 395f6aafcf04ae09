"""Does a micro-batch give the same loss, gradient and buffers when it is run again from the same state?"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.core.proof.compare import Difference, compare, gradients_of
from trainer.core.proof.culprit import first_to_differ
from trainer.core.proof.finding import Finding
from trainer.core.proof.generators import describe, generators_in
from trainer.core.proof.state import ModuleState, without_trace
from trainer.core.proof.trial import Tolerances, Trial

CHECK = "repeat"
# Of the whole gradient. Whoever draws other numbers is far above.
TOLERANCES = Tolerances(fp64=1e-10, fp32=1e-4, autocast=2e-2, on_gpu=1e-3)
REMEDY = (
    "draw from torch's, NumPy's or Python's global generator, which Lockstep seeds for each micro-batch, and let "
    "nothing else, such as the time, enter a forward"
)


def check_repeat(trial: Trial) -> list[Finding]:
    """Run this rank's first micro-batch twice."""
    run = trial.run
    index = trial.own_index
    with without_trace(run, weights=True) as states:
        results = _run(trial, index)
        for state in states:
            state.restore()
        results_again = _run(trial, index)
        difference = compare(results, results_again, trial.tolerance(TOLERANCES))
        if difference is None:
            return []
        for state in states:
            state.restore()
        return [_explain(trial, index, difference, states)]


def _run(trial: Trial, index: int) -> dict[str, Tensor | None]:
    """What a micro-batch leaves: its loss and weight, gradients, and buffers."""
    run = trial.run
    for module in (run.module, run.task):
        module.zero_grad()
    total, weight = trial.forward_and_backward(index)
    results: dict[str, Tensor | None] = {
        "the loss": total.detach().clone(),
        "the loss's weight": torch.as_tensor(weight).clone(),
    }
    results |= gradients_of(run.module, run.task)
    for name, buffer in run.module.named_buffers():
        results[f"buffer {name}"] = buffer.clone()
    return results


def _explain(
    trial: Trial, index: int, difference: Difference, states: list[ModuleState]
) -> Finding:
    run = trial.run
    part = _part_that_differs(trial, index, states)
    owner = run.task if part == "the loss" else run.module
    if part not in ("the loss", "the model"):
        owner = run.module.get_submodule(part)
    generators = generators_in(owner)
    draws = f", which draws from {describe(generators)}" if generators else ""
    return Finding(
        CHECK,
        f"a micro-batch run twice from the same state gives two results, from {part} on{draws} ({difference})",
        REMEDY,
    )


def _part_that_differs(trial: Trial, index: int, states: list[ModuleState]) -> str:
    run = trial.run
    if run.config.train.compile:
        return "the model"  # hooks would compile it anew

    def restore() -> None:
        for state in states:
            state.restore()

    def forward() -> None:
        run.forward(run.module, trial.batch(index), trial.step)

    part = first_to_differ(
        run.module, forward, restore, restore, exact=trial.repeats_bits
    )
    return part or "the loss"
