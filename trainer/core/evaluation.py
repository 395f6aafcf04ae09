"""Evaluation: every validation sample exactly once, on any number of processes, the same numbers on each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.core.features import Features
from trainer.core.forward import Forward
from trainer.core.metrics import Meter
from trainer.data.loading import Loader, whole_requests
from trainer.data.samples import MicroBatch, Request
from trainer.process.ranks import Ranks


@dataclass(frozen=True)
class Decision:
    """What a classifier made of one validation sample."""

    sample_id: int
    predicted: int
    true: int
    confidence: float


class Evaluator:
    """Runs a model over a data set, in order, each rank a contiguous share of unequal size where it must be.

    Loader processes are kept from one evaluation to the next and start on the next one early.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        loader: Loader,
        gather_statistics: Callable[[], None],
        ranks: Ranks,
        *,
        samples: int,
        batch_size: int,
        exact: bool,
        features: Features,
    ) -> None:
        self._model = model
        self._forward = forward
        self._gather_statistics = gather_statistics
        self._features = features
        self._ranks = ranks
        self._exact = exact
        self._requests = list(whole_requests(samples, batch_size, ranks.rank, ranks.count))
        self._loader = loader
        self._batches: Generator[MicroBatch, None, None] | None = None

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss and metrics over all samples. A collective."""
        meter = Meter(self._forward.task, self._ranks, exact=self._exact)
        for _, model, batch in self._in_eval_mode():
            output, loss, weight = self._forward(model, batch, None)
            meter.add(loss, weight, output, batch.targets)
        return meter.read().means()

    @torch.no_grad()
    def decisions(self) -> list[Decision]:
        """A classifier's decision for every sample that counts, in order, on every rank; empty for other tasks."""
        task = self._forward.task
        mine: list[Decision] = []
        for request, model, batch in self._in_eval_mode():
            shares = task.probabilities(self._forward.output(model, batch))
            if shares is None or not isinstance(batch.targets, Tensor) or batch.targets.dim() != 1:
                continue
            confidence, predicted = shares.max(1)
            columns = request.ids.tolist(), predicted.tolist(), batch.targets.tolist(), confidence.tolist()
            rows = [Decision(*row) for row in zip(*columns, strict=True)]
            mine += [row for row in rows if row.true != task.ignore_index]
        return sorted(self._ranks.gather(mine), key=lambda decision: decision.sample_id)

    def close(self) -> None:
        """End the loader processes; another evaluation starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def forget(self) -> None:
        """The model's weights are others now: compute everything anew."""
        self._features.clear()

    def _in_eval_mode(self) -> Iterator[tuple[Request, nn.Module, MicroBatch]]:
        """Each batch with what it is to be run through: the model, or its head where the batch holds its features."""
        self._gather_statistics()
        self._model.eval()
        held = self._features.batches()
        if held is not None:
            self.close()
            yield from ((request, *pair) for request, pair in zip(self._requests, held, strict=True))
        else:
            if self._batches is None:
                self._batches = self._loader.run(itertools.cycle(self._requests))
            with self._features.recording(self._model) as record:
                batches = itertools.islice(self._batches, len(self._requests))
                for request, batch in zip(self._requests, batches, strict=True):
                    yield request, self._model, batch
                    record(batch)
        self._model.train()
