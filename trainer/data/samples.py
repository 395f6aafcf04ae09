"""Micro-batches on request, by sample id and epoch. Each sample's random draws are keyed by both.

A sample that comes again in the same epoch draws anew: its draws are keyed by its occurrence, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from trainer.data.bad_samples import BadSample, is_bad_sample
from trainer.data.batches import Loaded, MicroBatch, Request, source_of
from trainer.data.collation import Collation, describe_ids
from trainer.data.conversion import (
    as_pair,
    input_as_tensor,
    target_as_tensor,
)
from trainer.data.datasets import ImageArrays, MapDataset
from trainer.data.fast_crop import CropBatch, is_decoded_image
from trainer.data.folder import ImageFolder
from trainer.data.geometry import SampleTransform
from trainer.data.image_list import are_of_several_sizes, pack
from trainer.data.no_batch import why_no_batch
from trainer.data.one_range import OneRange
from trainer.data.sample_names import SampleNames, describe_failure
from trainer.data.stacking import stack_decoded
from trainer.data.worker_failure import is_limit
from trainer.errors import DataError, data_error
from trainer.exact.plan import Ids
from trainer.exact.seeding import (
    host_state,
    key,
    preserved_cpu_generators,
    preserved_torch_generator,
    seed_cpu,
    seed_torch,
)


class KeyedDataset(Dataset[Any]):
    """`Request` → `MicroBatch`, or a `DataError` for the caller to raise: it may come from another process.

    With `leaves_out`, `Request` → `Loaded`: the samples that can be read, and why the others cannot.

    A sample's random draws are keyed by (seed, purpose, epoch, sample id): they are the same in any process and in any
    order, and new in each epoch. Where a sample comes more than once in an epoch, its second and later occurrences are
    part of the key.

    Messages call the samples `label` (by default `purpose`), and the key of their transforms `transforms_key`.
    """

    def __init__(
        self,
        dataset: MapDataset,
        transform: Callable[..., Any] | None,
        *,
        seed: int,
        purpose: str,
        leaves_out: bool = False,
        collation: Collation | None = None,
        label: str | None = None,
        transforms_key: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.leaves_out = leaves_out
        self.collation = collation
        self.transforms_key = transforms_key or _key_of_transforms(purpose)
        self._transform: SampleTransform | None = None
        if transform is not None:
            self._transform = SampleTransform(transform, self.transforms_key)
        self._seed = seed
        self._purpose = purpose
        self.label = label or purpose
        self.name = SampleNames(dataset, self.label)
        # In-memory data without transforms has nothing random: a micro-batch is one look-up.
        is_untouched = transform is None and collation is None
        self.arrays: ImageArrays | None = None
        if isinstance(dataset, ImageArrays) and is_untouched:
            self.arrays = dataset
        self._batch = None if self.arrays is None else self.arrays.batch
        self.draws = self._batch is None
        self._may_read_only = self._leaves_images_alone()
        # torchvision's transforms draw from torch alone; others may draw from `random` and NumPy, too.
        self._seed_draws: Callable[[int], object] = seed_cpu
        if self._may_read_only:
            self._seed_draws = seed_torch
        self._crops = self._find_crops()
        self._range = OneRange()
        # Set where channels are put apart later: a batch of decoded images is then as `stack_decoded` makes it.
        self.stacks_decoded = False
        self.tells_source = False  # whether a batch says which samples it holds
        # Set where `data.batch_transforms` take images of several sizes, and files that the device decodes.
        self.packs_images = False
        # What a message of images that make no batch says besides their transforms.
        self.advice_on_sizes = ""
        self.reads_files = False
        # Set in a loader process: told of each sample before it is loaded.
        self.at_sample: Callable[[int], None] | None = None

    def __getitem__(self, request: Request) -> MicroBatch | Loaded | DataError:
        if self.leaves_out:
            return self.load_readable(request)
        batch = self._in_one_piece(request)
        if batch is not None:
            return batch
        samples = []
        try:
            for sample_id, occurrence in request.pairs():
                sample = self._sample_of_batch(request.epoch, sample_id, occurrence)
                samples.append(sample)
            return self._batch_of(samples, request)
        except DataError as error:
            return error

    def load_readable(self, request: Request) -> Loaded | DataError:
        """What there is of a request; an error where what can be read makes no batch, or the machine fails."""
        if not len(request.ids):
            return Loaded(None, request, [])
        batch = self._in_one_piece(request)
        if batch is not None:
            return Loaded(batch, request, [])
        samples = []
        positions = []
        bad: list[BadSample] = []
        for position, (sample_id, occurrence) in enumerate(request.pairs()):
            try:
                sample = self._sample_of_batch(request.epoch, sample_id, occurrence)
                samples.append(sample)
                positions.append(position)
            except DataError as error:
                if not is_bad_sample(error):
                    return error
                bad.append(self.name.describe_bad(sample_id, error))
        readable = request.only(positions)
        if not samples:
            return Loaded(None, readable, bad)
        try:
            return Loaded(self._batch_of(samples, readable), readable, bad)
        except DataError as error:
            return error

    def _in_one_piece(self, request: Request) -> MicroBatch | None:
        """The batch, where no sample of it need be made by itself: looked up, or cropped; else None."""
        if self._batch is not None:
            return self._look_up(self._batch, request)
        return self._cropped(request)

    def _look_up(
        self, batch: Callable[[Tensor], tuple[Any, Any]], request: Request
    ) -> MicroBatch:
        inputs, targets = batch(torch.from_numpy(request.ids))
        return self.micro_batch(inputs, targets, request)

    @property
    def keeps_channels_together(self) -> bool:
        """True if its batches of images may lie in memory as `torch.channels_last`, and mean nothing by it."""
        return self._crops is not None or self.stacks_decoded

    def preserved_draws(self) -> AbstractContextManager[None]:
        """A context that puts back the generators that a request draws from."""
        # Saving them costs more than a look-up, which draws nothing.
        if not self.draws:
            return nullcontext()
        if self._may_read_only:
            return preserved_torch_generator()
        return preserved_cpu_generators()

    def _find_crops(self) -> CropBatch | None:
        if self._transform is None or not self._may_read_only:
            return None
        return self._transform.crop_batch()

    def _cropped(self, request: Request) -> MicroBatch | None:
        """What making it sample by sample gives, made in one piece; None where that is not possible.

        What is wrong with a sample is left to be found there, too.
        """
        count = len(request.ids)
        if self._crops is None or not count:
            return None
        images = self._crops.empty(count)
        if self.at_sample is not None:  # in a loader process
            images.share_memory_()  # type: ignore[no-untyped-call]
        targets = []
        for position, (sample_id, occurrence) in enumerate(request.pairs()):
            self._seed_for(request.epoch, sample_id, occurrence)
            if self.at_sample is not None:
                self.at_sample(sample_id)
            try:
                image, target = self.dataset.read_only(sample_id)  # type: ignore[attr-defined]
            # Anything: it comes again where the sample is made by itself, and is told of there.
            except Exception:
                return None
            if not is_decoded_image(image) or not isinstance(target, int | float):
                return None
            self._crops.fill(images, position, image)
            targets.append(target)
        return self.micro_batch(images, default_collate(targets), request)

    def _batch_of(self, samples: list[tuple[Any, Any]], request: Request) -> MicroBatch:
        if self.collation is None:
            self._range.check(samples, request.ids, self.name)
            inputs, targets = self._collate(samples, request.ids)
        else:
            inputs, targets = self._collate_by(self.collation, samples, request)
        return self.micro_batch(inputs, targets, request)

    def micro_batch(self, inputs: Any, targets: Any, request: Request) -> MicroBatch:
        """The batch of a request, of inputs and targets that are put together already."""
        count = len(request.ids)
        source = source_of(request) if self.tells_source else None
        return MicroBatch(
            request.first, inputs, targets, request.fused, None, count, source
        )

    def sample(
        self, epoch: int, sample_id: int, occurrence: int = 0
    ) -> tuple[Any, Any]:
        """The input and target of one sample, transformed. It seeds the CPU's generators."""
        # All that a data set or transform may draw from; the caller restores the rank's generators (`draws`).
        self._seed_for(epoch, sample_id, occurrence)
        if self.at_sample is not None:
            self.at_sample(sample_id)
        try:
            if self._may_read_only:
                image, target = self.dataset.read_only(sample_id)  # type: ignore[attr-defined]
            else:
                image, target = self.pair(sample_id)
            if self._transform is not None:
                image, target = self._transformed(image, target, sample_id)
            return input_as_tensor(image), target_as_tensor(target)
        except DataError:
            raise
        except Exception as error:
            # Anything: the data set and the transforms are other people's code.
            message = f"{self.name(sample_id)}: {describe_failure(error)}"
            raise data_error(message, error) from error

    def _sample_of_batch(
        self, epoch: int, sample_id: int, occurrence: int
    ) -> tuple[Any, Any]:
        """The same as a batch is made of it: a file where the device decodes it, and nothing else is done to it."""
        if not self.reads_files:
            return self.sample(epoch, sample_id, occurrence)
        if self.at_sample is not None:
            self.at_sample(sample_id)
        return self.dataset.read_file(sample_id)  # type: ignore[attr-defined,no-any-return]

    def _leaves_images_alone(self) -> bool:
        """True if nothing writes into an image before a batch is made of it: then it need not be copied first."""
        may_write = self._transform is not None and self._transform.may_write
        # Not of a class of somebody's own, which gives other samples.
        own = getattr(type(self.dataset), "__getitem__", None)
        is_offered = own is ImageFolder.__getitem__
        return is_offered and not may_write and self.collation is None

    def draws_for(self, sample_id: int) -> bool:
        """True if fetching a sample draws from a generator that is seeded for it. The caller restores them."""
        self.sample(0, sample_id)
        after = host_state()
        self._seed_for(0, sample_id, 0)
        return after != host_state()

    def _seed_for(self, epoch: int, sample_id: int, occurrence: int) -> None:
        position = [epoch, sample_id]
        if occurrence:
            position.append(occurrence)
        self._seed_draws(key(self._seed, self._purpose, *position))

    def pair(self, sample_id: int) -> tuple[Any, Any]:
        """A sample's input and target as the data set gives them. Draws from what generators are there."""
        sample = self.dataset[sample_id]
        # Nearly every sample is one, and nothing more is to be found out about it.
        if type(sample) is tuple and len(sample) == 2:
            return sample
        return as_pair(sample, f"{self.label} sample {sample_id}")

    def _transformed(self, image: Any, target: Any, sample_id: int) -> tuple[Any, Any]:
        assert self._transform is not None
        try:
            return self._transform(image, target)
        except DataError as error:
            raise type(error)(f"{self.name(sample_id)}: {error}") from None
        except Exception as error:
            # Anything: transforms are other people's code.
            name = self.name(sample_id)
            reason = describe_failure(error)
            message = f"{name}: {self.transforms_key} failed with {reason}"
            raise data_error(message, error) from error

    def _collate(self, samples: list[tuple[Any, Any]], ids: Ids) -> tuple[Any, Any]:
        try:
            images, targets = zip(*samples, strict=True)
            return self._join(images), default_collate(list(targets))
        except Exception as error:
            if self.at_sample is not None and is_limit(error):
                # The batch is made in memory shared with the rank, which tells of its end.
                raise
            # Anything: samples are other people's values.
            raise why_no_batch(
                samples,
                ids,
                error,
                label=self.label,
                name=self.name,
                transforms_key=self.transforms_key,
                advice_on_sizes=self.advice_on_sizes,
            ) from error

    def _join(self, inputs: Sequence[Any]) -> Any:
        """The inputs of a batch as one."""
        if self.packs_images and (self.reads_files or are_of_several_sizes(inputs)):
            return pack(inputs)
        if self.stacks_decoded:
            batch = stack_decoded(inputs)
            if batch is not None:
                return batch
        return default_collate(list(inputs))

    def _collate_by(
        self, collation: Collation, samples: list[tuple[Any, Any]], request: Request
    ) -> tuple[Any, Any]:
        """The batch that `data.collate` makes. What it draws is keyed by the epoch and the batch's first sample."""
        pairs = list(request.pairs())
        ids = [sample_id for sample_id, _ in pairs]
        position = (request.epoch, *pairs[0], len(pairs))
        seed_cpu(key(self._seed, f"{self._purpose} batch", *position))
        try:
            return collation(samples)
        except DataError:
            raise
        except Exception as error:
            if self.at_sample is not None and is_limit(error):
                raise
            # Anything: the function is other people's code.
            message = (
                f"data.collate={collation.name} failed on the {self.label} samples {describe_ids(ids)}: "
                f"{describe_failure(error)}"
            )
            raise data_error(message, error) from error


def _key_of_transforms(purpose: str) -> str:
    # Files to predict go through the transforms of validation.
    part = "val" if purpose == "predict" else purpose
    return f"data.{part}_transforms"
