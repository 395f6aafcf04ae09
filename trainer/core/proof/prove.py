"""The proof: the promise, tried on a run's own model, loss and data before its first step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.core.observers import Stateful
from trainer.core.proof.finding import Finding
from trainer.core.proof.generators import preserved_in
from trainer.core.proof.moved import check_moved
from trainer.core.proof.noise import note_noise
from trainer.core.proof.processes import check_processes
from trainer.core.proof.rebuild import check_rebuild
from trainer.core.proof.repeat import check_repeat
from trainer.core.proof.samples import check_samples
from trainer.core.proof.state import without_trace
from trainer.core.proof.trial import MICRO_BATCHES, Trial
from trainer.core.run import Run
from trainer.data.train_loader import TrainLoader
from trainer.errors import ConfigError, LockstepError
from trainer.exact.modes import preserved_modes


class Check(NamedTuple):
    """A check, and how many micro-batches it runs forward and backward at least."""

    name: str
    run: Callable[[Trial], list[Finding]]
    micro_batches: int


CHECKS = (
    Check("samples", check_samples, 0),
    Check("repeat", check_repeat, 2),
    Check("processes", check_processes, 4),
    Check("moved", check_moved, 2),
    Check("rebuild", check_rebuild, 3),
)
# Few, because every run begins with them; `check` may take its time.
SAMPLES = 4
SAMPLES_IN_CHECK = 32
MICRO_BATCHES_IN_CHECK = 8
# Seconds for the micro-batches of one check: fewer of them where they take long, and no check where they take too long.
TIME_LIMIT = 3.0
TIME_LIMIT_IN_CHECK = 60.0
ADVICE = "or use run.reproducibility=standard, which only warns"
ADVICE_OF_STRICT = "or use run.proof=on, which only warns"


@dataclass
class Proof:
    """What the proof of a run has done and found, the same on every rank."""

    seconds: float = 0.0
    checks: list[str] = field(default_factory=list)  # made to the end
    skipped: list[str] = field(default_factory=list)  # each with the reason
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    off: str = ""  # why none was made

    def facts(self) -> list[tuple[str, str]]:
        """Lines for the header of a run."""
        if self.off:
            return [("proof", self.off)]
        result = "no finding"
        if self.findings:
            result = f"{len(self.findings)} of them found a difference"
        line = f"{self.seconds:.1f} s: {', '.join(self.checks) or 'nothing'} · {result}"
        lines = [("proof", " · ".join([line, *self.skipped]))]
        lines += [("warning", f"{f.check}: {f}") for f in self.findings]
        lines += [("note", note) for note in self.notes]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As `summary.json` holds it: nothing that differs between two equal runs."""
        return {
            "checks": self.checks,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def prove(
    run: Run,
    steps_done: int = 0,
    *,
    optimizer: Optimizer | None = None,
    stateful: Mapping[str, Stateful] | None = None,
    batches: TrainLoader | None = None,
    thorough: bool = False,
) -> Proof:
    """Try the promise on the step after `steps_done`. A collective that leaves no trace.

    `batches` are the run's own, if loader processes make them. `thorough` tries more samples and micro-batches.

    Raises `ConfigError` that lists all findings in bitwise mode, and with `run.proof=strict` in either mode.
    """
    if run.config.run.proof == "off":
        return Proof(off="off: nothing was tried on this model, loss and data")
    if run.is_sharded:
        return Proof(
            off="none: with train.parallel=fsdp no process can run a micro-batch by itself"
        )
    if run.ranks.device.type not in ("cpu", "cuda"):
        return Proof(off="none: it needs a CPU or a CUDA device")
    if steps_done >= run.plan.total_steps:
        return Proof(off="none: no step is left")
    start = perf_counter()
    trial = Trial(
        run,
        run.plan.step(steps_done),
        samples=SAMPLES_IN_CHECK if thorough else SAMPLES,
        optimizer=optimizer,
        stateful=stateful or {},
        batches=batches,
        micro_batches=MICRO_BATCHES_IN_CHECK if thorough else MICRO_BATCHES,
    )
    with _in_training_mode(run.module), preserved_in(run.train_loader.dataset):
        proof = _try(trial, TIME_LIMIT_IN_CHECK if thorough else TIME_LIMIT)
    if run.ranks.device.type == "cuda":
        del trial
        torch.cuda.empty_cache()  # what the checks compared is not what training allocates
    proof.seconds = perf_counter() - start
    _refuse(run, proof)
    return proof


@contextmanager
def _in_training_mode(module: nn.Module) -> Iterator[None]:
    with preserved_modes(module):
        module.train()
        yield


def _try(trial: Trial, time_limit: float) -> Proof:
    """Make every check, one after the other."""
    proof = Proof()
    for check in CHECKS:
        problem = _limit_micro_batches(trial, check, time_limit)
        findings: list[Finding] = []
        if not problem:
            findings, problem = _on_all_ranks(trial, check.run)
        if problem:
            proof.skipped.append(f"{check.name} skipped: {problem}")
            continue
        proof.checks.append(check.name)
        proof.findings += findings
        if findings and check.name != "samples":
            break  # one cause would be named by every later check, too
    if trial.seconds is not None and trial.seconds <= time_limit:
        proof.notes = _notes(trial)
    return proof


def _limit_micro_batches(trial: Trial, check: Check, time_limit: float) -> str:
    """Let a check run as few micro-batches as the time allows; returns why it cannot be made. A collective."""
    if not check.micro_batches:
        return ""
    if trial.seconds is None:
        problem = _measure(trial, time_limit)
        if problem:
            return problem
    assert trial.seconds is not None
    if check.micro_batches * trial.seconds > time_limit:
        return f"a micro-batch takes {trial.seconds:.1f} s"
    affordable = int(time_limit / (2 * trial.seconds))
    trial.micro_batches = max(2, min(trial.micro_batches, affordable))
    return ""


def _measure(trial: Trial, time_limit: float) -> str:
    """Note how long a micro-batch takes; returns why none can be run. A collective."""
    run = trial.run
    for _ in range(2):
        start = perf_counter()
        _, problem = _on_all_ranks(trial, _run_one)
        if problem:
            return problem
        trial.seconds = max(run.ranks.gather([perf_counter() - start]))
        is_once_slow = run.config.train.compile or run.ranks.device.type == "cuda"
        if trial.seconds <= time_limit / 4 or not is_once_slow:
            break  # else compiling and loading kernels may have taken most of it
    return ""


def _run_one(trial: Trial) -> list[Finding]:
    with without_trace(trial.run, weights=True):
        trial.forward_and_backward(trial.own_index)
    return []


def _on_all_ranks(
    trial: Trial, check: Callable[[Trial], list[Finding]]
) -> tuple[list[Finding], str]:
    """The findings of the first rank that has any, and why some rank could not make the check. A collective."""
    ranks = trial.run.ranks
    own = ranks.on_each(lambda: _attempt(trial, check))
    of_ranks = ranks.gather([own])
    problems = [problem for _, problem in of_ranks if problem]
    if problems:
        return [], problems[0]
    for findings, _ in of_ranks:
        if findings:
            return findings, ""
    return [], ""


def _attempt(trial: Trial, check: Callable[[Trial], Any]) -> tuple[Any, str]:
    """The result of a check, and why it could not be made.

    What fails here fails in the first step as well, which explains it better. It may also need what comes later: an
    observer that begins, or the memory that the proof itself takes.
    """
    try:
        return check(trial), ""
    except LockstepError:
        raise
    except torch.OutOfMemoryError:
        problem = "no memory is left for it"
    except Exception as error:
        problem = f"{type(error).__name__}"
    # The handler must end before memory is freed: its traceback refers to the activations.
    gc.collect()
    if trial.run.ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return [], problem


def _notes(trial: Trial) -> list[str]:
    notes, _ = trial.run.ranks.on_each(lambda: _attempt(trial, note_noise))
    of_ranks = trial.run.ranks.gather([notes])
    return next((lines for lines in of_ranks if lines), [])


def _refuse(run: Run, proof: Proof) -> None:
    is_strict = run.config.run.proof == "strict"
    if not proof.findings or not (run.bitwise or is_strict):
        return
    listed = "".join(f"\n  {f.check}: {f}" for f in proof.findings)
    if run.bitwise:
        raise ConfigError(
            "run.reproducibility",
            f"bitwise cannot hold for this model, loss and data:{listed}\n{ADVICE}",
        )
    raise ConfigError(
        "run.proof",
        f"strict refuses what would not be the same on other hardware:{listed}\n{ADVICE_OF_STRICT}",
    )
