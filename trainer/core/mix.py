"""MixUp and CutMix: two images in one, and the loss of both their targets.

A micro-batch is mixed by itself, on the device. Each image gets a share of the one before it in the micro-batch (the
first one of the last), by torchvision's `MixUp` or `CutMix`. What is drawn is keyed by the seed, the step and the
micro-batch, so it depends neither on who runs the micro-batch nor on what shares its forward.

The loss is `λ · loss(targets) + (1 − λ) · loss(partners)`, as Zhang et al. (2018) define it. A loss that is linear in
its targets, as cross-entropy and its like are, has the same sum for the soft target `λ · target + (1 − λ) · partner`.
Its divisor is that of the plain targets: partners are the same targets in another order. So class weights, ignored
targets and label smoothing mean what they mean without mixing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.components.base_task import Task, WeightedSum, as_weighted_sum
from trainer.config.fields import read_section
from trainer.config.train_section import MixConfig, TrainConfig
from trainer.data.batches import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.plan import Step
from trainer.exact.seeding import numpy_generator
from trainer.exact.structures import describe_tensors, part_of

KEY = "train.mix"


class Blend(NamedTuple):
    """The two targets of each sample of a mixed batch, and how much of the image is the first one's."""

    targets: Tensor
    partners: Tensor
    shares: tuple[float, ...]  # λ of each micro-batch; 1 where it is not mixed

    def rows(self, rows: slice) -> Blend:
        """The same of some samples of a batch of one micro-batch."""
        assert len(self.shares) == 1
        return self._replace(targets=self.targets[rows], partners=self.partners[rows])


class Mix:
    """What `settings` ask for, in a run of `total_steps` steps."""

    def __init__(self, settings: MixConfig, seed: int, total_steps: int) -> None:
        from torchvision.transforms import v2

        self._settings = settings
        self._seed = seed
        self._total_steps = total_steps
        # 0.7 of 10 steps are 7, whatever floats make of it.
        self.last_step = math.floor(settings.off_after * total_steps + 1e-9)
        is_on = settings.mixup > 0 or settings.cutmix > 0
        # True if no micro-batch is ever mixed.
        self.is_idle = not (is_on and settings.prob > 0 and self.last_step > 0)
        self._mixup = v2.MixUp()
        self._cutmix = v2.CutMix()

    def describe(self) -> str:
        """One line for the run's header; "" where nothing is mixed."""
        if self.is_idle:
            return ""
        settings = self._settings
        parts = []
        if settings.mixup:
            parts.append(f"MixUp {settings.mixup:g}")
        if settings.cutmix:
            parts.append(f"CutMix {settings.cutmix:g}")
        text = " or ".join(parts)
        if len(parts) > 1:
            text += f" ({settings.switch_prob:.0%})"
        if settings.prob < 1:
            text += f" in {settings.prob:.0%} of the micro-batches"
        if self.last_step < self._total_steps:
            text += f", up to step {self.last_step:,}"
        return f"{text} · train/loss is that of the mixed targets"

    def __call__(self, batch: MicroBatch, step: Step) -> MicroBatch:
        """The batch with mixed images, the target of the larger share for each, and the `blend` that its loss is of.

        The batch itself where `step` or what is drawn leaves it as it is.
        """
        is_over = self.is_idle or step.number > self.last_step
        if is_over or batch.blend is not None:
            return batch
        images: list[Tensor] = []
        shares: list[float] = []
        first, _ = batch.indices
        for index, part in enumerate(_parts(batch.inputs, batch.fused)):
            mixed, share = self._mix(part, step, first + index)
            images.append(mixed)
            shares.append(share)
        if all(share == 1 for share in shares):
            return batch
        blend = self._blend(batch, shares)
        return batch._replace(
            inputs=_join(images), targets=_stronger(blend), blend=blend
        )

    def _mix(self, images: Tensor, step: Step, index: int) -> tuple[Tensor, float]:
        """The images of micro-batch `index`, mixed, and the share of each in its place."""
        settings = self._settings
        if len(images) < 2:
            return images, 1.0
        draws = numpy_generator(self._seed, "mix", step.number, index)
        chance, choice, across, down = draws.random(4)
        if chance >= settings.prob:
            return images, 1.0
        # What torchvision's `make_params` would draw, from generators of its own.
        arguments: dict[str, Any] = {"labels": None, "batch_size": len(images)}
        if not self._is_cutmix(choice):
            share = draws.beta(settings.mixup, settings.mixup)
            arguments["lam"] = share
            return self._mixup.transform(images, arguments), share
        share = draws.beta(settings.cutmix, settings.cutmix)
        height, width = images.shape[-2:]
        box = _box(share, across, down, height=height, width=width)
        arguments["box"] = box
        # The share that is left: a box at the border is smaller than the one that was drawn.
        x1, y1, x2, y2 = box
        share = 1.0 - (x2 - x1) * (y2 - y1) / (width * height)
        return self._cutmix.transform(images, arguments), share

    def _is_cutmix(self, choice: float) -> bool:
        settings = self._settings
        if settings.mixup and settings.cutmix:
            return choice < settings.switch_prob
        return settings.cutmix > 0

    def _blend(self, batch: MicroBatch, shares: list[float]) -> Blend:
        parts = _parts(batch.targets, batch.fused)
        # As torchvision pairs the images.
        partners = _join([part.roll(1, 0) for part in parts])
        return Blend(batch.targets, partners, tuple(shares))


def _box(
    share: float, across: float, down: float, *, height: int, width: int
) -> tuple[int, int, int, int]:
    """`(x1, y1, x2, y2)` of the part that comes from the partner, `1 − share` of the image if all of it is within.

    `across` and `down` say where its centre is, in [0, 1) (Yun et al., 2019, as in torchvision's `CutMix`).
    """
    half = 0.5 * math.sqrt(1.0 - share)
    x = int(across * width)
    y = int(down * height)
    half_width = int(half * width)
    half_height = int(half * height)
    return (
        max(x - half_width, 0),
        max(y - half_height, 0),
        min(x + half_width, width),
        min(y + half_height, height),
    )


def _stronger(blend: Blend) -> Tensor:
    """The target of the larger share of each image: what metrics are measured against."""
    count = len(blend.shares)
    targets = _parts(blend.targets, count)
    partners = _parts(blend.partners, count)
    stronger = []
    for share, own, partner in zip(blend.shares, targets, partners, strict=True):
        stronger.append(own if share >= 0.5 else partner)
    return _join(stronger)


def _parts(tensor: Tensor, count: int) -> Sequence[Tensor]:
    """What of a batch belongs to each of `count` micro-batches, all of one size."""
    return (tensor,) if count == 1 else tensor.chunk(count)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def blended_loss(task: Task, output: Any, blend: Blend) -> WeightedSum:
    """The loss of a mixed batch, summed over its samples, and the weight of its plain targets."""
    count = len(blend.shares)
    targets = _parts(blend.targets, count)
    partners = _parts(blend.partners, count)
    total: Tensor | None = None
    weight: Tensor | int = 0
    for index, share in enumerate(blend.shares):
        part = output
        if count > 1:
            part = part_of(output, index, count=count, samples=len(blend.targets))
        own = as_weighted_sum(task.loss_sum(part, targets[index]))
        loss = own.total
        if share < 1:
            other = as_weighted_sum(task.loss_sum(part, partners[index]))
            loss = own.total * share + other.total * (1 - share)
        total = loss if total is None else total + loss
        weight = weight + own.weight
    assert total is not None
    return WeightedSum(total, weight)


def build_mix(
    section: TrainConfig, task: Task, sample: MicroBatch, *, seed: int, total_steps: int
) -> Mix:
    """The mixing that `train.mix` asks for. `sample` is one as the model sees it.

    Raises `ConfigError` where images cannot be mixed, or targets not blended.
    """
    mix = Mix(read_section(MixConfig, section.mix), seed, total_steps)
    if not mix.is_idle:
        _check_task(task)
        _check_sample(sample)
    return mix


def _check_task(task: Task) -> None:
    if task.whole_step:
        raise ConfigError(
            KEY,
            f"blends the loss of two targets within a micro-batch, and this loss ({type(task).__name__}) is of a whole "
            f"step at once (whole_step); leave it out",
        )
    if not task.targets_are_classes:
        raise ConfigError(
            KEY,
            f"blends the classes of two images, and the targets of this loss ({type(task).__name__}) are not known to "
            f"be classes: half of one value and half of another is no answer to a regression, nor are two sets of "
            f"boxes. Leave it out, or let a Task of yours say targets_are_classes = True",
        )


def _check_sample(sample: MicroBatch) -> None:
    images, targets = sample.inputs, sample.targets
    is_image = isinstance(images, Tensor) and images.dim() == 4
    if not is_image or not images.is_floating_point():
        raise ConfigError(
            KEY,
            f"mixes images (N, C, H, W), and the model's inputs are {describe_tensors(images)}; leave it out",
        )
    if not isinstance(targets, Tensor) or targets.dim() not in (1, 2):
        raise ConfigError(
            KEY,
            f"blends one class, or one set of labels, of each image, and the targets are {describe_tensors(targets)}; "
            f"a mask has a class for each place, which changes with the image that is pasted there. Leave it out",
        )
