"""What a transform of a whole batch is, and how a list of them is applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trainer.data.batches import Source
from trainer.data.conversion import describe
from trainer.data.image_list import ImageList
from trainer.errors import ConfigError, LockstepError, config_error
from trainer.exact.counter_draws import CounterDraws, check_hash
from trainer.exact.seeding import key

KEY = "data.batch_transforms"
# Batched targets of more dimensions have a place for each pixel, or for a part of the image.
MOST_TARGET_DIMS = 2


class BatchTransform(Protocol):
    """A transform of a batch of images. What it makes of one image depends on that image and its draws alone.

    `draws` says how many numbers it needs for each sample. With `moves = False` it leaves every pixel in its place, so
    that a mask of the image still fits.
    """

    draws: int

    def __call__(self, images: Tensor, draws: Tensor, /) -> Tensor:
        """`(B, C, H, W)` and whole numbers from 0 to 2³² − 1, int64 `(B, draws)` → `(B, C, H', W')`."""
        ...


@runtime_checkable
class SizingTransform(BatchTransform, Protocol):
    """One that also makes images of one size of images of several sizes. It must come first."""

    def of_several_sizes(self, images: Sequence[Tensor], draws: Tensor, /) -> Tensor:
        """uint8 `(C, H, W)` each, and draws as above → `(B, C, H', W')`."""
        ...


class BatchTransforms:
    """`transforms`, one after the other. Each draws for itself: one that is added last changes no other's draws."""

    def __init__(
        self,
        transforms: Sequence[BatchTransform],
        names: Sequence[str],
        *,
        seed: int,
        purpose: str,
        device: torch.device,
    ) -> None:
        check_hash(device)
        self._transforms = transforms
        self._names = names
        bases = []
        for index, name in enumerate(names):
            bases.append(key(seed, f"{purpose} batch transform {name}", index))
        counts = [transform.draws for transform in transforms]
        self._draws = CounterDraws(bases, counts, device)

    @property
    def takes_several_sizes(self) -> bool:
        """True if the first of them makes images of one size."""
        return isinstance(self._transforms[0], SizingTransform)

    def __call__(self, images: Any, source: Source) -> Tensor:
        """Images `(B, C, H, W)` of the samples of `source`, or an `ImageList` of them, changed.

        Raises `ConfigError` for what is no batch of images.
        """
        is_list = isinstance(images, ImageList) and self.takes_several_sizes
        is_batch = isinstance(images, Tensor) and images.dim() == 4
        if not is_list and not is_batch:
            raise ConfigError(
                KEY,
                f"changes images (N, C, H, W) of one size, and the inputs are {describe(images)}; leave it out",
            )
        changed = images
        all_draws = self._draws(*source)
        for name, transform, draws in zip(
            self._names, self._transforms, all_draws, strict=True
        ):
            try:
                changed = _apply(transform, changed, draws)
            except (LockstepError, torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception as error:
                # Anything: a transform may be other people's code.
                message = f"{name} failed with {type(error).__name__}: {error}"
                raise config_error(KEY, message, error) from error
            _check_result(name, changed, len(images))
        result: Tensor = changed
        return result

    def check_targets(self, targets: Any) -> None:
        """Raise `ConfigError` for targets that have a place in the image, which a transform would move alone."""
        moving = []
        for name, transform in zip(self._names, self._transforms, strict=True):
            if getattr(transform, "moves", True):
                moving.append(name)
        is_plain = isinstance(targets, Tensor) and targets.dim() <= MOST_TARGET_DIMS
        if moving and not is_plain:
            raise ConfigError(
                KEY,
                f"{', '.join(moving)} would move the images and not their targets, {describe(targets)}; use "
                f"data.train_transforms, which move both",
            )

    def describe(self) -> str:
        """Their names, for the run's header."""
        return ", ".join(self._names)


def _apply(transform: BatchTransform, images: Tensor | ImageList, draws: Tensor) -> Any:
    if isinstance(images, ImageList):
        assert isinstance(transform, SizingTransform)  # the first, which was asked
        return transform.of_several_sizes(images.images, draws)
    return transform(images, draws)


def _check_result(name: str, changed: Any, count: int) -> None:
    """Raise `ConfigError` unless a transform of other people's has made one image of each of `count`."""
    is_batch = isinstance(changed, Tensor) and changed.dim() == 4
    if not is_batch or len(changed) != count:
        raise ConfigError(
            KEY,
            f"{name} has made {describe(changed)} of {count} images; it must give images (N, C, H, W), one for each",
        )
