"""`train.mix`: images and losses against torchvision's MixUp and CutMix with the same λ, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from tests.distributed.small import (
    CLASSES,
    Images,
    Points,
    config,
    conv_net,
    header_of,
    mlp,
    rows_of,
)
from trainer import Trainer
from trainer.components.task import Task, WeightedSum, as_task
from trainer.config.model_sections import LossConfig
from trainer.config.train_section import MixConfig
from trainer.core.mix import Blend, Mix, blended_loss
from trainer.core.no_effect import keys_without_effect
from trainer.data.batches import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.plan import Plan, Step
from trainer.exact.seeding import numpy_generator

SEED = 5
BOTH: dict[str, Any] = {"mixup": 0.4, "cutmix": 1.0}


def a_step(number: int = 1) -> Step:
    return Plan(64, 16, 4, 1, 5, SEED).step(number - 1)


def a_batch(first: int = 0, fused: int = 1, size: int = 4) -> MicroBatch:
    draws = torch.Generator().manual_seed(first)
    images = torch.randn(fused * size, 2, 6, 7, generator=draws, dtype=torch.float64)
    targets = torch.randint(CLASSES, (fused * size,), generator=draws)
    return MicroBatch(first, images, targets, fused)


def mix(total_steps: int = 20, **settings: Any) -> Mix:
    return Mix(MixConfig(**settings), SEED, total_steps)


def by_torchvision(
    batch: MicroBatch, number: int, settings: MixConfig
) -> tuple[Tensor, Tensor, float]:
    """Images, soft targets and λ of one micro-batch, by torchvision's transforms with the draws of this one's key."""
    draws = numpy_generator(SEED, "mix", number, batch.first)
    _, choice, across, down = draws.random(4)
    one_hot = F.one_hot(batch.targets, CLASSES).double()
    facts: dict[str, Any] = {"labels": one_hot, "batch_size": len(one_hot)}
    if choice < settings.switch_prob:
        share = draws.beta(settings.cutmix, settings.cutmix)
        transform: Any = v2.CutMix(num_classes=CLASSES)
        half = 0.5 * np.sqrt(1 - share)
        # As `make_params` cuts its box about a centre.
        x, y, w, h = int(across * 7), int(down * 6), int(half * 7), int(half * 6)
        box = max(x - w, 0), max(y - h, 0), min(x + w, 7), min(y + h, 6)
        share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / 42
        facts |= {"box": box, "lam_adjusted": share}
    else:
        share = draws.beta(settings.mixup, settings.mixup)
        transform = v2.MixUp(num_classes=CLASSES)
        facts |= {"lam": share}
    images = transform.transform(batch.inputs, facts)
    return images, transform.transform(one_hot, facts), share


def soft(blend: Blend) -> Tensor:
    """The soft targets of a batch of one micro-batch."""
    (share,) = blend.shares
    own, other = (F.one_hot(ids, CLASSES).double() for ids in blend[:2])
    return own * share + other * (1 - share)


def test_images_and_soft_targets_are_torchvisions() -> None:
    settings = MixConfig(**BOTH)
    kinds = set()
    for number in range(1, 20):
        for index in range(4):
            batch = a_batch(index)
            mixed = mix(**BOTH)(batch, a_step(number))
            images, targets, share = by_torchvision(batch, number, settings)
            assert torch.equal(mixed.inputs, images)
            if share == 1:
                assert mixed is batch
                continue
            torch.testing.assert_close(soft(mixed.blend), targets, rtol=0, atol=1e-15)
            kinds.add(((images == batch.inputs).any().item(), share < 0.5))
            # Metrics are measured against the larger share.
            assert torch.equal(mixed.targets, targets.argmax(1)) or share == 0.5
    assert len(kinds) == 4, "both kinds, with shares on both sides of a half"


def test_micro_batches_in_one_forward_are_mixed_by_themselves() -> None:
    for number in range(1, 6):
        parts = [a_batch(index) for index in (1, 2, 3)]
        together = MicroBatch(
            1,
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.targets for part in parts]),
            3,
        )
        apart = [mix(**BOTH, prob=0.7)(part, a_step(number)) for part in parts]
        mixed = mix(**BOTH, prob=0.7)(together, a_step(number))
        assert torch.equal(mixed.inputs, torch.cat([part.inputs for part in apart]))
        assert torch.equal(mixed.targets, torch.cat([part.targets for part in apart]))


def test_draws_have_the_shares_that_are_asked_for() -> None:
    plan = Plan(8, 4, 4, 1, 2000, SEED)
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    shares = []
    batch = a_batch()
    mixing = Mix(MixConfig(mixup=0.4, cutmix=1, prob=0.8, switch_prob=0.25), SEED, 4000)
    for step in plan.steps(0, 3000):
        mixed = mixing(batch, step)
        if mixed is batch:
            kinds["none"] += 1
        elif (mixed.inputs == batch.inputs).any():
            kinds["cutmix"] += 1
        else:
            kinds["mixup"] += 1
            shares.append(mixed.blend.shares[0])
    # A box of no area mixes nothing: some of CutMix's.
    assert abs(kinds["mixup"] - 3000 * 0.8 * 0.75) < 90
    assert 0.8 * 600 < kinds["cutmix"] <= 690
    # Beta(a, a): mean 1/2 and variance 1 / (4 (2a + 1)).
    assert abs(np.mean(shares) - 0.5) < 0.03
    assert abs(np.var(shares) - 1 / (4 * 1.8)) < 0.01


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"class_weights": [1.0, 2.0, 0.5, 3.0]},
        {"label_smoothing": 0.1},
        {"class_weights": [1.0, 2.0, 0.5, 3.0], "label_smoothing": 0.1},
    ],
)
def test_the_loss_is_torchs_of_soft_targets(loss: dict[str, Any]) -> None:
    """The same sum and gradient; divided by the weight of the plain targets, as an epoch without mixing is."""
    task = as_task(LossConfig(name="cross_entropy", args=loss), CLASSES).double()
    weights = loss.get("class_weights")
    torchs = {
        "weight": None if weights is None else torch.tensor(weights).double(),
        "label_smoothing": loss.get("label_smoothing", 0.0),
        "reduction": "sum",
    }
    batch = mix(mixup=1.0)(a_batch(size=9), a_step())
    output = torch.randn(9, CLASSES, dtype=torch.float64, requires_grad=True)
    total, weight = blended_loss(task, output, batch.blend)
    expected = F.cross_entropy(output, soft(batch.blend), **torchs)
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(value, output)[0] for value in (total, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    plain = a_batch(size=9).targets
    assert weight == (9 if weights is None else torchs["weight"][plain].sum())


def test_ignored_targets_and_several_labels_are_exact_too() -> None:
    share = 0.3
    output = torch.randn(4, CLASSES, dtype=torch.float64)
    own = torch.tensor([0, -1, 2, 3])
    blend = Blend(own, own.roll(1), (share,))
    task = as_task(LossConfig(name="cross_entropy", args={"ignore_index": -1}))
    total, weight = blended_loss(task, output, blend)
    logs = output.log_softmax(1)
    expected = torch.zeros((), dtype=torch.float64)
    for row, (label, partner) in enumerate(zip(*blend[:2], strict=True)):
        expected -= share * logs[row, label] if label >= 0 else 0.0
        expected -= (1 - share) * logs[row, partner] if partner >= 0 else 0.0
    torch.testing.assert_close(total, expected)
    assert weight == 3

    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    blend = Blend(labels, labels.roll(1, 0), (share,))
    positive = torch.tensor([1.0, 4, 2, 0.5]).double()
    section = LossConfig(name="bce_with_logits", args={"pos_weight": positive.tolist()})
    total, weight = blended_loss(as_task(section).double(), output, blend)
    targets = (labels * share + labels.roll(1, 0) * (1 - share)).double()
    torch.testing.assert_close(
        total,
        F.binary_cross_entropy_with_logits(
            output, targets, pos_weight=positive, reduction="sum"
        ),
    )
    assert weight == 16


class ScaledCrossEntropy(Task):
    """Of outputs that have a tensor for all samples beside one with a row for each."""

    targets_are_classes = True

    def loss_sum(self, output: Any, targets: Any) -> WeightedSum:
        logits = output["logits"] * output["scale"]
        return WeightedSum(
            F.cross_entropy(logits, targets, reduction="sum"), len(targets)
        )


def test_a_tensor_for_all_samples_belongs_to_each_micro_batch_at_once() -> None:
    logits = torch.randn(8, CLASSES, dtype=torch.float64)
    scale = torch.tensor(3.0, dtype=torch.float64)
    targets = torch.randint(CLASSES, (8,))
    task = ScaledCrossEntropy()
    expected = 0.0
    for rows, share in ((slice(4), 0.3), (slice(4, 8), 0.8)):
        own = targets[rows]
        blend = Blend(own, own.roll(1), (share,))
        output = {"logits": logits[rows], "scale": scale}
        expected += float(blended_loss(task, output, blend).total)
    partners = torch.cat([targets[:4].roll(1), targets[4:].roll(1)])
    blend = Blend(targets, partners, (0.3, 0.8))
    total, weight = blended_loss(task, {"logits": logits, "scale": scale}, blend)
    assert float(total) == pytest.approx(expected, rel=1e-14)
    assert weight == 8


def test_a_run_is_a_plain_loop_with_torchvisions_transforms(tmp_path: Path) -> None:
    """fp64: weights and logged losses of a run whose last third is not mixed."""
    settings = config(
        tmp_path,
        run__seed=SEED,
        train__mix={"mixup": 0.4, "cutmix": 1.0, "off_after": 0.67},
        train__epochs=3,
        batch__size=16,
        batch__micro_size=4,
    )
    data = Images(30)
    net = conv_net().double()
    trainer = Trainer(settings, model=conv_net(), train_data=data)
    trainer.fit()
    rows = [row for row in rows_of(tmp_path / "run") if "train/loss" in row]

    # Images of 5 × 5 here; the box is cut by the code under test, which another test compares.
    mixing = Mix(MixConfig(mixup=0.4, cutmix=1.0, off_after=0.67), SEED, 6)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    losses = []
    for step in trainer.plan.steps():
        total = torch.zeros((), dtype=torch.float64)
        for index in range(len(step.micro_batches)):
            ids = trainer.plan.sample_ids(step, index)
            batch = MicroBatch(index, data.points[ids], data.labels[ids])
            images, targets = batch.inputs, F.one_hot(batch.targets, CLASSES).double()
            mixed = mixing(batch, step)
            if mixed.blend is not None:
                assert step.number <= 4
                images, targets = mixed.inputs, soft(mixed.blend)
            total = total + F.cross_entropy(net(images), targets, reduction="sum")
        (total / step.size).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach() / step.size))
    assert [row["train/loss"] for row in rows] == pytest.approx(losses, rel=1e-12)
    for parameter, expected in zip(
        trainer.module.parameters(), net.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, expected, rtol=1e-11, atol=1e-13)


def test_a_single_sample_is_not_mixed_nor_is_what_comes_after() -> None:
    batch = a_batch(size=1)
    assert mix(mixup=1.0)(batch, a_step()) is batch
    batch = a_batch()
    mixing = mix(mixup=1.0, off_after=0.9, total_steps=10)
    assert mixing(batch, a_step(9)) is not batch
    assert mixing(batch, a_step(10)) is batch


# ---------------------------------------------------------------- refused


class Masks(Images):
    def __getitem__(self, i: int) -> Any:
        image, label = super().__getitem__(i)
        return image, torch.full((5, 5), label)


class Boxes(Images):
    def __getitem__(self, i: int) -> Any:
        image, label = super().__getitem__(i)
        return image, {"boxes": torch.zeros(1, 4), "labels": torch.tensor([label])}


class Detection(Task):
    def loss_sum(self, output: Tensor, targets: Any) -> WeightedSum:
        return WeightedSum(output.sum(), len(output))


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        (Images(30), {"loss__name": "mse"}, "to a regression"),
        (Images(30), {"loss__name": f"{__name__}.Detection"}, "two sets of boxes"),
        (Masks(30), {}, "a mask has a class for each place"),
        (Boxes(30), {}, "the targets are dict of"),
        (Points(30, ignored=False), {}, r"mixes images .N, C, H, W., and the model's"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(
    tmp_path: Path, data: Any, more: dict[str, Any], message: str
) -> None:
    model = mlp() if type(data) is Points else nn.Sequential(nn.Conv2d(2, CLASSES, 1))
    settings = config(tmp_path, train__mix={"mixup": 0.2}, **more)
    with pytest.raises(ConfigError, match=message) as caught:
        Trainer(settings, model=model, train_data=data)
    assert caught.value.key == "train.mix"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": -1}, "train.mix.mixup: -1.0 is less than 0"),
        ({"prob": 1.5}, "train.mix.prob: 1.5 is more than 1"),
        ({"cutmx": 1}, 'train.mix.cutmx: no such key; did you mean "cutmix"'),
        ({"mixup": "much"}, "train.mix.mixup: much is not a number"),
    ],
)
def test_a_wrong_value_is_one_message(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        config(tmp_path, train__mix=settings)


def test_mixing_that_does_nothing_is_said_so(tmp_path: Path) -> None:
    for changes, reason in (
        ({"train__mix": {"mixup": 0.0}}, "neither mixup nor cutmix is above 0"),
        ({"train__mix": {"mixup": 1, "off_after": 0}}, "or else prob or off_after"),
        ({"train__mix": {"mixup": 1}, "batch__micro_size": 1}, "is one sample"),
    ):
        frozen = {"batch_norm__mode": "frozen"}  # which a micro-batch of one needs
        settings = config(tmp_path, **changes, **frozen)
        trainer = Trainer(settings, model=conv_net(), train_data=Images())
        (line,) = [
            line for line in keys_without_effect(trainer.run) if "train.mix" in line
        ]
        assert reason in line


def test_the_header_says_how_images_are_mixed(tmp_path: Path) -> None:
    settings = config(tmp_path, train__mix={**BOTH, "off_after": 0.5, "prob": 0.8})
    trainer = Trainer(settings, model=conv_net(), train_data=Images())
    assert header_of(trainer, tmp_path)["mix"] == (
        "MixUp 0.4 or CutMix 1 (50%) in 80% of the micro-batches, up to step 4 · "
        "train/loss is that of the mixed targets"
    )
