"""A run whose epochs a sampler chooses: the same on any number of processes, with loader processes, and resumed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    HASHES,
    Images,
    config,
    conv_net,
    largest_difference,
    state,
)
from trainer import ConfigError, Trainer
from trainer.data.train_loader import TrainLoader

REPEATED = {"name": "repeated", "repeats": 3, "samples": 40}


def curriculum(labels: Any, seed: int, epoch: int) -> Any:
    """More of class 0 in each epoch, some of it several times."""
    draws = np.random.default_rng([seed, epoch])
    chances = np.where(labels == 0, 2.0 + epoch, 1.0)
    return draws.choice(len(labels), 60, p=chances / chances.sum())


def of_this_rank(samples: int) -> Any:
    return np.roll(np.arange(samples), int(os.environ.get("RANK", "0")))


class LabelledImages(Images):
    def __init__(self) -> None:
        super().__init__(64)
        self.targets = self.labels


def settings(directory: Path, sampler: dict[str, Any], **changes: Any) -> Any:
    return config(
        directory,
        **{
            "run__reproducibility": "bitwise",
            "data__sampler": sampler,
            "data__train_transforms": [{"name": "RandomHorizontalFlip"}],
            "batch__size": 25,
            "batch__micro_size": 5,
            **changes,
        },
    )


def loaded(directory: Path, workers: int, sampler: dict[str, Any]) -> dict[Any, Any]:
    """The pixels of this rank's samples: (step, micro-batch) → ids, inputs."""
    transforms = [{"name": "RandomCrop", "size": 3}]
    trainer = Trainer(
        settings(
            directory,
            sampler,
            run__reproducibility="standard",
            data__workers=workers,
            data__train_transforms=transforms,
        ),
        model=nn.Sequential(nn.Flatten(), nn.Linear(18, CLASSES)),
        train_data=Images(30),
    )
    loader = TrainLoader(trainer.run.train_loader, trainer.plan, trainer.ranks.rank, 0)
    batches = {}
    for step in trainer.plan.steps():
        for batch in loader.step(step):
            ids = trainer.plan.sample_ids(step, batch.first).tolist()
            batches[step.number, batch.first] = ids, batch.inputs.clone()
    loader.close()
    return batches


def run(directory: Path, sampler: dict[str, Any], stop: int | None = None) -> Any:
    """The hashes of a run and how many samples it saw; with `stop` one that is resumed there by whoever comes next."""
    whole = settings(directory, sampler, run__resume="auto")
    if stop is not None:
        whole = replace(whole, train=replace(whole.train, stop_after=stop))
    trainer = Trainer(
        whole, model=conv_net(), train_data=LabelledImages(), val_data=Images(20)
    )
    summary = trainer.fit()
    return [summary[name] for name in (*HASHES, "samples_seen")]


def several(directory: Path, workers: int, stopped: Path | None) -> Any:
    result = [
        loaded(directory / "loaded", workers, REPEATED),
        run(directory / "balanced", {"name": "balanced", "samples": 60}),
        run(directory / "own", {"name": f"{__name__}.curriculum"}),
    ]
    if stopped is not None:
        result.append(run(stopped, {"name": f"{__name__}.curriculum"}))
    if "RANK" in os.environ:
        with pytest.raises(ConfigError, match="other samples for epoch 0 on rank 1"):
            run(directory / "other", {"name": f"{__name__}.of_this_rank"})
    return result


def joined(parts: list[Any]) -> dict[Any, Any]:
    return {place: batch for part in parts for place, batch in part[0].items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("reference")
    return on_ranks(1, several, directory, 0, None)[0]


@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (3, 0)])
def test_equal_on_any_ranks_and_resumed_on_others(
    tmp_path: Path, reference: Any, ranks: int, workers: int
) -> None:
    stopped = tmp_path / "stopped"
    # Within the second epoch of three steps.
    on_ranks(1, run, stopped, {"name": f"{__name__}.curriculum"}, 4)
    parts = on_ranks(ranks, several, tmp_path, workers, stopped)
    for part in parts:
        assert part[1:3] == reference[1:3]
        assert part[3] == reference[2], "resumed"
    assert reference[1][3] == reference[2][3] == 2 * 60
    batches = joined(parts)
    assert batches.keys() == reference[0].keys()
    for place, (ids, inputs) in reference[0].items():
        assert ids == batches[place][0]
        assert torch.equal(inputs, batches[place][1])


def test_each_occurrence_is_augmented_anew_and_the_first_as_without_repeats(
    tmp_path: Path, reference: Any
) -> None:
    (plain,) = on_ranks(1, loaded, tmp_path, 0, {})
    crops_of_plain = {
        (number > 2, sample): crop  # two steps an epoch
        for (number, _), (ids, crops) in plain.items()
        for sample, crop in zip(ids, crops, strict=True)
    }
    occurrences: dict[Any, list[torch.Tensor]] = {}
    for (number, _), (ids, crops) in reference[0].items():
        for sample, crop in zip(ids, crops, strict=True):
            occurrences.setdefault((number > 2, sample), []).append(crop)
    assert len(occurrences) == 2 * 14  # 40 = 13 × 3 + 1
    differing = 0
    for place, crops in occurrences.items():
        assert torch.equal(crops[0], crops_of_plain[place])
        differing += sum(not torch.equal(crop, crops[0]) for crop in crops[1:])
    # A crop has nine places, so one in nine is the first's by chance.
    assert differing > 2 * 13 * 2 * 0.7


class DamagedImages(LabelledImages):
    """Two of its samples cannot be read."""

    def __getitem__(self, i: int) -> Any:
        if i in (3, 17):
            raise ValueError("damaged")
        return super().__getitem__(i)


def left_out(directory: Path) -> Any:
    """What repeats and mixing make of micro-batches that lack a sample, or all of theirs."""
    results: list[Any] = []
    for name, fuse, mode in (("bits", 1, "bitwise"), ("fused", 3, "standard")):
        trainer = Trainer(
            settings(
                directory / name,
                {"name": "repeated", "repeats": 6},
                run__reproducibility=mode,
                data__bad_samples="quarantine",
                train__mix={"mixup": 0.4, "cutmix": 1.0},
                batch__fuse=fuse,
                train__max_steps=12,
            ),
            model=conv_net(),
            train_data=DamagedImages(),
        )
        summary = trainer.fit()
        results.append((summary["samples_seen"], summary["weights_sha256"]))
        results.append(state(trainer))
    return results


def test_repeats_and_mixing_of_what_a_quarantine_leaves(tmp_path: Path) -> None:
    (of_one,) = on_ranks(1, left_out, tmp_path / "one")
    bits, exact, _, fused = of_one
    assert bits[0] < 12 * 25
    assert largest_difference(fused, exact) < 1e-12
    for of_rank in on_ranks(2, left_out, tmp_path / "two"):
        assert of_rank[0] == bits
        assert of_rank[2][0] == bits[0]
        assert largest_difference(of_rank[3], exact) < 1e-12
