"""Evaluation: every validation sample exactly once, on any number of processes, the same numbers on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.components.answers import Answer
from trainer.components.task import WeightedSum
from trainer.core.evaluation_metrics import EvaluationMetrics
from trainer.core.features import Features
from trainer.core.forward import Forward
from trainer.core.mean_iou import MeanIoU, add_counts
from trainer.core.metrics import Meter, detach
from trainer.core.misfit import explained
from trainer.core.running_at_fault import is_finite_without_them
from trainer.core.samples import samples_not_finite
from trainer.data.bad_samples import Quarantine
from trainer.data.batches import MicroBatch, Request
from trainer.data.datasets import MapDataset
from trainer.data.loading import Loader
from trainer.data.passes import passes
from trainer.data.requests import whole_requests
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.modes import preserved_modes
from trainer.exact.moving_buffers import preserved_buffers
from trainer.exact.plan import Ids
from trainer.exact.seeding import preserved_generators
from trainer.process.activity import EVALUATING, FIRST_EVALUATION, activity
from trainer.process.ranks import Ranks

# Spread over a rank's share: images of another size or a broken file are seldom alone.
SAMPLES_TO_REHEARSE = 8


# Called with sample ids, output and targets.
OnBatch = Callable[[Ids, Any, Any], None]


@dataclass(frozen=True)
class Decision:
    """A classifier's answer for one validation sample."""

    sample_id: int
    predicted: int
    true: int
    confidence: float


@dataclass(frozen=True)
class EvaluationSet:
    """A set that a run is evaluated on. `phase` begins the names of its metrics: `val`, `val/<name>` or `test`."""

    phase: str
    dataset: MapDataset
    loader: Loader
    evaluator: Evaluator

    @property
    def prefix(self) -> str:
        """What the phase adds to `val/`: nothing, or the set's name and a slash."""
        name = self.phase.partition("/")[2]
        return f"{name}/" if name else ""


class Evaluator:
    """Runs a model over a data set, in order; each rank takes a contiguous share, not always of equal size.

    Shares are made of whole batches, and the config alone cuts these. So a model whose answer for a sample depends on
    the others of its batch, or that draws, answers the same on any number of ranks.

    The model's running statistics must be the true ones (`Reduction.gather`). Loader processes live on from one
    evaluation to the next, and load the next one's first batches early.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        loader: Loader,
        ranks: Ranks,
        *,
        samples: int,
        batch_size: int,
        exact: bool,
        features: Features,
        metrics: EvaluationMetrics,
        quarantine: Quarantine | None = None,
        is_sharded: bool = False,
    ) -> None:
        self._model = model
        self._forward = forward
        self._features = features
        self._metrics = metrics
        self._ranks = ranks
        self._exact = exact
        requests = list(whole_requests(samples, batch_size, ranks.rank, ranks.count))
        self._passes = passes(loader, requests, quarantine)
        # Where a forward is a collective: the share of rank 0, which is the largest.
        self._largest_share: list[Request] = []
        if is_sharded:
            self._largest_share = list(
                whole_requests(samples, batch_size, 0, ranks.count)
            )
        self._loader = loader
        self._phase = FIRST_EVALUATION  # until the first batch

    @torch.no_grad()
    def evaluate(self, on_batch: OnBatch | None = None) -> dict[str, float]:
        """The mean loss and metrics over all samples. A collective.

        `on_batch` is called with the sample ids, the output and the targets of each of this rank's batches.
        """
        task = self._forward.task
        meter = Meter(task, self._ranks, exact=self._exact)
        self._metrics.begin()
        with preserved_modes(task), preserved_generators():
            task.eval()  # until the last metric is measured
            for request, model, batch in self._in_eval_mode(self._evaluated):
                output, loss = self._evaluated(model, batch)
                meter.add(batch, output, loss)
                if self._metrics:
                    self._metrics.add(detach(output), batch.targets)
                if on_batch is not None:
                    on_batch(request.ids, output, batch.targets)
            self._passes.agree()
            row = meter.read().means()
            if self._metrics:
                row |= self._metrics.finish()
            return row

    @torch.no_grad()
    def rehearse(self) -> None:
        """Run a few samples of this rank's share and measure them, as an evaluation would; the result is discarded.

        Where a forward is a collective, every rank runs the same ones, so that all fail alike.
        """
        requests = self._largest_share or self._passes.requests
        if not requests:
            return
        first_request, last_request = requests[0], requests[-1]
        first = first_request.ids[0]
        last = last_request.ids[-1]
        of_share = last - first + 1
        count = min(of_share, SAMPLES_TO_REHEARSE, len(first_request.ids))
        ids = np.linspace(first, last, count).astype(np.int64)
        task = self._forward.task
        with self._eval_mode():
            batch = self._loader.peek(ids)
            output, _ = self._forward(self._model, batch, None)
            with explained(task, "metric_sums", output, batch.targets):
                task.metric_sums(output, batch.targets)
            if self._metrics:
                self._metrics.rehearse(output, batch.targets)

    @torch.no_grad()
    def samples_not_finite(self) -> tuple[list[int], bool]:
        """The samples of the first batch whose loss is not finite: those with such inputs, else all. A collective.

        And True if they are not to blame, but the running statistics of norm layers.
        """
        with self._eval_mode():
            own = self._own_samples_not_finite()
        of_ranks = self._ranks.gather([own])
        found = list(chain.from_iterable(ids for ids, _ in of_ranks))
        return found, any(by_statistics for _, by_statistics in of_ranks)

    def _own_samples_not_finite(self) -> tuple[list[int], bool]:
        found: list[int] = []
        by_statistics = False
        for request in self._passes.requests:
            batch = self._loader.peek(request.ids)
            _, loss = self._evaluated(self._model, batch)
            if not found and not loss.total.isfinite():
                bad = samples_not_finite(self._loader, batch, request.ids, 0)
                found = bad or request.ids.tolist()
                by_statistics = not bad and self._is_finite_by_itself(batch)
            if found and not self._largest_share:
                break
        self._keep_up(self._evaluated, None)
        return found, by_statistics

    def _is_finite_by_itself(self, batch: MicroBatch) -> bool:
        """True if the batch's loss is finite by its own statistics."""
        if self._largest_share:
            return False  # another forward would be one of all ranks
        whole = ModelAndLoss(self._model, self._forward.task)
        return is_finite_without_them(
            whole, lambda: self._evaluated(self._model, batch)[1].total
        )

    @torch.no_grad()
    def decisions(self) -> list[Decision]:
        """A classifier's decision for every sample that counts, in order, on every rank; empty for other tasks."""
        decisions: list[Decision] = []
        with preserved_generators():
            for request, model, batch in self._in_eval_mode(self._forward.predict):
                decisions += self._decide(request, model, batch)
            self._passes.agree()
        decisions = self._ranks.gather(decisions)
        return sorted(decisions, key=lambda decision: decision.sample_id)

    @torch.no_grad()
    def answers(self, ids: list[int]) -> tuple[Any, Any, list[Answer]]:
        """Inputs and targets of some samples as model and loss take them, and an answer for each, if the task has any.

        Not a collective.
        """
        task = self._forward.task
        with preserved_generators(), self._eval_mode():
            batch = self._loader.peek(ids)
            output = self._forward.predict(self._model, batch)
            targets = task.convert_targets(output, batch.targets)
            answer = task.answer(output)
        return batch.inputs, targets, [] if answer is None else answer.samples()

    @torch.no_grad()
    def pixel_counts(self) -> Tensor:
        """Of a segmentation, how often each class (row) is predicted as each (column), `(C, C)`. A collective.

        Only the main process has the counts; those of the others are empty.
        """
        task = self._forward.task
        own = MeanIoU(task.ignore_index)
        with preserved_generators():
            for _, model, batch in self._in_eval_mode(self._forward.predict):
                output = self._forward.predict(model, batch)
                own.add(task.metric_inputs(output, batch.targets))
            self._passes.agree()
        of_ranks = self._ranks.gather_on_main(own.parts())
        none = torch.zeros(0, 0, dtype=torch.int64)
        return add_counts([none, *chain.from_iterable(of_ranks)])

    def _decide(
        self, request: Request, model: nn.Module, batch: MicroBatch
    ) -> list[Decision]:
        task = self._forward.task
        output = self._forward.predict(model, batch)
        probabilities = task.probabilities(output)
        if probabilities is None:
            return []
        targets = task.convert_targets(output, batch.targets)
        if not isinstance(targets, Tensor) or targets.dim() != 1:
            return []
        confidences, classes = probabilities.max(1)
        columns = (
            request.ids.tolist(),
            classes.tolist(),
            targets.tolist(),
            confidences.tolist(),
        )
        decisions = [Decision(*row) for row in zip(*columns, strict=True)]
        return [
            decision for decision in decisions if decision.true != task.ignore_index
        ]

    def close(self) -> None:
        """End the loader processes; another evaluation starts them again."""
        self._passes.close()

    def forget(self) -> None:
        """Discard what was cached: the model's weights have changed."""
        self._features.clear()

    def _evaluated(
        self, model: nn.Module, batch: MicroBatch
    ) -> tuple[Any, WeightedSum]:
        """The output and the loss of a batch."""
        return self._forward(model, batch, None)

    def _keep_up(
        self, run: Callable[[nn.Module, MicroBatch], Any], batch: MicroBatch | None
    ) -> None:
        """Where a forward is a collective: `run` a batch again until this rank has run as many as the busiest one."""
        missing = len(self._largest_share) - len(self._passes.requests)
        if missing > 0 and batch is None:
            batch = self._loader.peek(self._largest_share[0].ids)
        for _ in range(missing):
            assert batch is not None
            run(self._model, batch)

    def _in_eval_mode(
        self, run: Callable[[nn.Module, MicroBatch], Any]
    ) -> Iterator[tuple[Request, nn.Module, MicroBatch]]:
        """Each batch with what it is run through: the model, or its head where the batch holds the features.

        `run` is what the caller runs for each.
        """
        with self._eval_mode():
            batches_of_features = self._features.batches()
            if batches_of_features is None:
                batch = None
                for request, model, batch in self._loaded_batches():
                    yield request, model, batch
                self._keep_up(run, batch)
            else:
                self.close()
                for request, (head, batch) in zip(
                    self._passes.requests, batches_of_features, strict=True
                ):
                    activity.mark(EVALUATING)
                    yield request, head, batch

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """A context with model and loss in eval mode; afterwards each of their modules is in the mode that it had."""
        task = self._forward.task
        # A forward that moves buffers in eval mode, too, would move other ones on every rank.
        whole = ModelAndLoss(self._model, task)
        with (
            preserved_modes(self._model),
            preserved_modes(task),
            preserved_buffers(whole),
        ):
            self._model.eval()
            task.eval()
            yield

    def _loaded_batches(self) -> Iterator[tuple[Request, nn.Module, MicroBatch]]:
        with self._features.recording(self._model) as record:
            activity.mark(self._phase)
            for request, batch in self._passes.batches():
                activity.mark(self._phase)
                yield request, self._model, batch
                record(batch)
                self._phase = EVALUATING
