"""Batches that a function of one's own makes: the same run on any number of processes, loaders and after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tests.distributed.ranks import on_ranks
from tests.distributed.small import config, fitted, largest_difference, state
from trainer import ConfigError, LockstepError, Trainer
from trainer.components.small_models import small_detector
from trainer.data.shapes import Shapes
from trainer.exact.seeding import mix_key

SAMPLES, FEATURES, CLASSES = 31, 3, 4
PAD = "tests.distributed.test_collate.pad"


class Sequences:
    """Sequences `(T, 3)` of 2 to 9 steps, with the class of each."""

    classes = tuple("abcd")

    def __init__(self, samples: int = SAMPLES) -> None:
        draw = torch.Generator().manual_seed(5)
        self.targets = torch.randint(CLASSES, (samples,), generator=draw).tolist()
        self.lengths = torch.randint(2, 10, (samples,), generator=draw).tolist()
        self.values = torch.randn(samples, 9, FEATURES, generator=draw)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        length = self.lengths[index]
        # Augmentation: keyed by the sample, whatever its batch.
        noise = 0.1 * torch.randn(length, FEATURES)
        return self.values[index, :length] + noise, self.targets[index]


def pad(samples: list[tuple[Tensor, int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Padded to the longest of the batch, noise on the whole of it."""
    values = pad_sequence([value for value, _ in samples], batch_first=True)
    lengths = torch.tensor([len(value) for value, _ in samples])
    targets = torch.tensor([target for _, target in samples])
    return {"values": values + 0.01 * torch.rand(1), "lengths": lengths}, targets


class Recurrent(nn.Module):
    """The mean of an LSTM's outputs over each sequence's own steps, and its scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lstm = nn.LSTM(FEATURES, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        outputs, _ = self.lstm(values)
        is_step = torch.arange(values.shape[1]) < lengths[:, None]
        return self.head((outputs * is_step[..., None]).sum(1) / lengths[:, None])


def settings(directory: Path, ranks: int, **changes: Any) -> Any:
    changes = {
        "run__name": f"on_{ranks}",
        "batch__size": 12,
        "batch__micro_size": 3,
        "batch__eval_size": 5,
        **changes,
    }
    return config(directory, **changes)


def of_sequences(directory: Path, ranks: int, **changes: Any) -> tuple[Any, Any]:
    trainer = fitted(
        settings(directory, ranks, data__collate=PAD, **changes),
        Recurrent(),
        train_data=Sequences(),
        val_data=Sequences(14),
    )
    assert trainer.proof.findings == []
    assert "samples" in trainer.proof.checks
    return state(trainer), trainer.evaluate()


def of_shapes(directory: Path, ranks: int, **changes: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    trainer = fitted(
        settings(directory, ranks, loss__name="detection", **changes),
        small_detector(4, width=4, image_size=32),
        train_data=Shapes("train", 14, 40, "boxes", 0.3),
        val_data=Shapes("val", 7, 40, "boxes", 0.3),
    )
    assert trainer.proof.findings == []
    return state(trainer), trainer.evaluate()


@pytest.mark.parametrize("kind", [of_sequences, of_shapes])
def test_bit_for_bit_on_one_two_and_three_processes_and_after_a_stop(
    tmp_path: Path, kind: Any
) -> None:
    bitwise = {"run__reproducibility": "bitwise", "train__epochs": 1}
    changes = {**bitwise, "train__precision": "fp32"}
    [(expected, measured)] = on_ranks(1, kind, tmp_path, 1, **changes)
    assert measured
    for ranks, workers in ((2, 1), (3, 0)):
        runs = on_ranks(ranks, kind, tmp_path, ranks, **changes, data__workers=workers)
        for weights, metrics in runs:
            assert metrics == measured
            for name, tensor in expected.items():
                assert torch.equal(weights[name], tensor), name
    for ranks, end in ((2, 1), (1, None)):
        stopped = on_ranks(
            ranks,
            kind,
            tmp_path,
            "stopped",
            **changes,
            run__resume="auto",
            train__stop_after=end,
        )
    for name, tensor in expected.items():
        assert torch.equal(stopped[0][0][name], tensor), name


@pytest.mark.parametrize("kind", [of_sequences, of_shapes])
def test_in_standard_mode_within_the_bound_of_fp64(tmp_path: Path, kind: Any) -> None:
    [(expected, _)] = on_ranks(1, kind, tmp_path, 1, train__epochs=1)
    for weights, _ in on_ranks(3, kind, tmp_path, 3, train__epochs=1):
        assert largest_difference(weights, expected) < 1e-10


def test_the_step_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """Detection: a step's gradient is that of the mean of torchvision's losses, each micro-batch by its images."""

    def run() -> None:
        torch.manual_seed(1)
        model = small_detector(4, width=4, image_size=32)
        data = Shapes("train", 5, 40, "boxes", 0.3)
        trainer = Trainer(
            settings(tmp_path, 1, loss__name="detection", batch__size=5),
            model=model,
            train_data=data,
        )
        trainer.start()
        step = trainer.plan.step(0)
        gradients: dict[str, Tensor] = {}
        for index in range(len(step.micro_batches)):
            ids = trainer.plan.sample_ids(step, index).tolist()
            images = [data[i][0].double() * (1 / 255) for i in ids]
            targets = [data[i][1] for i in ids]
            batch = trainer.run.train_loader.peek(ids, index)
            for mine, theirs in zip(images, batch.inputs, strict=True):
                assert torch.equal(mine, theirs)
            # The sampler of proposals draws: by the run's own key.
            _, loss = trainer.run.forward(model, batch, step)
            forward = trainer.run.forward
            forward._seed_device(mix_key(forward._base_key, step.number, index))
            boxes = [{**t, "boxes": t["boxes"].double()} for t in targets]
            losses = model(images, boxes)
            mean = torch.stack(list(losses.values())).sum()
            assert float(loss.total) == pytest.approx(float(mean) * len(ids))
            assert loss.weight == len(ids)
            (mean * len(ids) / step.size).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
        model.zero_grad()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.train_step(step)
        for name, parameter in model.named_parameters():
            expected = before[name] - 0.1 * gradients[name]
            torch.testing.assert_close(parameter.detach(), expected)

    on_ranks(1, run)


def test_fuse_refuses_it_by_name_and_auto_says_why_it_is_one(tmp_path: Path) -> None:
    def run() -> tuple[str, str, str]:
        data = {"train_data": Sequences(), "val_data": Sequences(14)}
        with pytest.raises(ConfigError) as of_config:
            settings(tmp_path, 1, data__collate=PAD, batch__fuse=2)
        with pytest.raises(ConfigError) as of_task:
            Trainer(
                settings(tmp_path, 1, loss__name="detection", batch__fuse=2),
                model=small_detector(4),
                train_data=Shapes("train", 14, 40, "boxes"),
            )
        trainer = Trainer(
            settings(tmp_path, 1, data__collate=PAD, batch__fuse="auto"),
            model=Recurrent(),
            **data,
        )
        trainer.try_out()
        return str(of_config.value), str(of_task.value), trainer.fuse_note

    of_config, of_task, note = on_ranks(1, run)[0]
    assert of_config.startswith("batch.fuse: 2") and PAD in of_config
    assert of_task.startswith("batch.fuse: 2") and "data.collate=lists" in of_task
    assert note == f"data.collate={PAD} makes each batch anew"


def test_a_loss_that_is_not_finite_names_the_sample(tmp_path: Path) -> None:
    class Bad(Sequences):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            value, target = super().__getitem__(index)
            return (value * torch.nan if index == 5 else value), target

    def run() -> str:
        with pytest.raises(LockstepError) as caught:
            fitted(
                settings(tmp_path, 1, data__collate=PAD, run__proof="off"),
                Recurrent(),
                train_data=Bad(),
            )
        return str(caught.value)

    message = on_ranks(1, run)[0]
    assert "not finite already in the data: 5" in message


def test_a_replay_shows_the_step_as_it_was(tmp_path: Path) -> None:
    def run() -> Any:
        from trainer.inspection.replay import replay

        def new_trainer() -> Trainer:
            torch.manual_seed(1)
            return Trainer(
                settings(tmp_path, 1, loss__name="detection", train__epochs=1),
                model=small_detector(4, width=4, image_size=32),
                train_data=Shapes("train", 14, 40, "boxes", 0.3),
            )

        new_trainer().fit()
        result = replay(new_trainer, tmp_path / "on_1", 2)
        return result.logged["train/loss"], result.samples

    (logged, here), samples = on_ranks(1, run)[0]
    assert logged == pytest.approx(here, rel=1e-12)
    assert len(samples) == 2  # of 14 in steps of 12
    assert "boxes" in samples[0]["target"]
    rows = (tmp_path / "on_1" / "metrics.jsonl").read_text().splitlines()
    assert all("val/loss" not in json.loads(row) for row in rows)
