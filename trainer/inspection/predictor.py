"""A run's best model, applied to image files. Built from the run directory alone, without the run's data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from trainer.components.answers import Answer
from trainer.components.dtypes import cast
from trainer.components.models import build_model
from trainer.components.task import build_task
from trainer.config.data_section import DataConfig
from trainer.core.forward import Forward
from trainer.core.further import LossState, restore_evaluated
from trainer.core.precision import Precision
from trainer.core.run import settings_of
from trainer.core.trust import read_trusted_config
from trainer.data.batches import MicroBatch, Request
from trainer.data.collation import Collation, build_collation
from trainer.data.image_reading import ImageReading
from trainer.data.normalize import Normalize
from trainer.data.samples import KeyedDataset
from trainer.data.transforms import build_transforms
from trainer.data.workers import WorkerLoader, iterate
from trainer.errors import ConfigError, DataError, LockstepError
from trainer.exact.structures import dtype_name
from trainer.process import launcher
from trainer.process.ranks import Ranks
from trainer.storage import best_model, checkpoint, signature
from trainer.storage.run_directory import config_file
from trainer.storage.signature import Signature


class Predictor:
    """The best model of the run at `run`, with its validation transforms, normalisation and class names.

    `overrides` are `key=value` changes of the run's config. A model that was passed to the run's `Trainer`, instead of
    being named in its config, must be passed here too. Of a run that was not made here, the config may import from the
    packages `trust` only, besides well-known libraries.

    Attributes: `config`, `signature`, `device`, `module`, `task`, `normalize`.

    Raises `ConfigError` if `run` is no run directory or several processes were started, and `LockstepError` if the
    run has no best model or its weights do not fit.
    """

    def __init__(
        self,
        run: str | Path,
        overrides: Sequence[str] = (),
        *,
        model: nn.Module | None = None,
        trust: Sequence[str] = (),
    ) -> None:
        run = Path(run)
        config_file(run)  # the error for a directory that is no run
        best = best_model.directory(run)
        imports = ["loss", "data.val_transforms", "data.collate"]
        if model is None:
            imports.append("model")
        self.config = read_trusted_config(
            run, overrides, trust, imports=imports, directory=best
        )
        # A model is built in them in training, too.
        with settings_of(self.config):
            self._build(run, best, model)

    def _build(self, run: Path, best: Path, model: nn.Module | None) -> None:
        self.signature = signature.read(best)
        self.device = _device_of_one_process(self.config.train.precision)
        precision = Precision(self.config.train.precision, self.device)

        module = self._build_model() if model is None else model
        cast(module, precision.dtype, self.device)
        self.module = module.eval()
        # After the change of dtype, which would round an fp64 run's weights.
        self._load_weights(run)
        task = build_task(self.config.loss, self.signature.num_classes)
        cast(task, precision.dtype, self.device)
        self.task = task.eval()
        restore_evaluated(
            best_model.load_further(run),
            self.module,
            LossState(self.module, self.task),
        )
        data = self.config.data
        self._collation = build_collation(data.collate)
        self.normalize = Normalize(
            data.mean,
            data.std,
            precision.dtype,
            structured=data.collate is not None or data.columns is not None,
        ).to(self.device)
        self._forward = Forward(self.task, precision, self.device, self.config.run.seed)

    def classify(
        self, paths: Sequence[str | Path]
    ) -> Iterator[tuple[Path, Tensor | DataError]]:
        """Each file in order, with the probability of every class, or with an error that says why there is none.

        Probabilities are `(classes,)` on the CPU. Raises `ConfigError` if the run trained no classifier.
        """
        for path, answer in self.predict(paths):
            if isinstance(answer, DataError):
                yield path, answer
            elif answer.kind == "class":
                yield path, answer.values
            else:
                raise ConfigError(
                    "loss.name",
                    f"{self.config.loss.name} trains no classifier of whole images, so there are no classes to "
                    f"predict; use `predict`, which answers for every task",
                )

    def predict(
        self, paths: Sequence[str | Path]
    ) -> Iterator[tuple[Path, Answer | DataError]]:
        """Each file in order, with the model's answer for it, or with an error that says why there is none.

        Raises `ConfigError` if it is not known what the run's task answers.
        """
        size = self.config.batch.eval_size
        files = list(map(Path, paths))
        with settings_of(self.config):
            batches = self._load_files(files)
        for start in range(0, len(files), size):
            batch_paths = files[start : start + size]
            # Around one batch, not the loop: a generator must not leave settings changed while its caller runs.
            with settings_of(self.config), torch.inference_mode():
                answers = self._answer_batch(batch_paths, next(batches))
            yield from zip(batch_paths, answers, strict=True)

    def _answer_batch(
        self, paths: Sequence[Path], items: Sequence[MicroBatch | DataError]
    ) -> list[Answer | DataError]:
        """The answer for each file of a batch; only usable images go through the model."""
        checked = []
        for path, item in zip(paths, items, strict=True):
            checked.append(self._check_image(path, item))
        images = [image for image in checked if isinstance(image, Tensor)]
        found = iter(self._answer_images(images))
        answers: list[Answer | DataError] = []
        for image in checked:
            answers.append(image if isinstance(image, DataError) else next(found))
        return answers

    def _answer_images(self, images: list[Tensor]) -> list[Answer]:
        """An answer for each image `(1, C, H, W)`."""
        # A detector pads images to the largest of their batch: by itself, each has an answer of its own.
        is_one_by_one = self.signature.form == "list"
        size = 1 if is_one_by_one else max(1, len(images))
        answers: list[Answer] = []
        for start in range(0, len(images), size):
            answers += self._answers_for(self._batch(images[start : start + size]))
        return answers

    def answer(self, inputs: Any) -> list[Answer]:
        """An answer for each sample of a batch of inputs, as transforms and `data.collate` leave them.

        For models that take more than an image: `{"image": (N, C, H, W), "age": (N,)}`. Raises `ConfigError` if it is
        not known what the run's task answers.
        """
        with settings_of(self.config), torch.inference_mode():
            return self._answers_for(inputs)

    def _batch(self, images: list[Tensor]) -> Any:
        """Images `(1, C, H, W)` as the batch that the run would make of them."""
        if self._collation is not None:
            return self._collate(self._collation, images)
        if self.signature.form != "named":
            return torch.cat(images)
        names = list(self.signature.parts or {})
        if len(names) > 1:
            raise ConfigError(
                "PATH",
                f"the model takes {', '.join(names)}, and a file is one of them; give all of them to "
                f"trainer.Predictor(run).answer(inputs) in Python",
            )
        return {names[0]: torch.cat(images)}

    def _collate(self, collation: Collation, images: list[Tensor]) -> Any:
        try:
            inputs, _ = collation([(image[0], None) for image in images])
        except Exception as error:
            # Anything: the function is other people's code, made for samples with targets.
            raise ConfigError(
                "data.collate",
                f"{collation.name} makes no batch of files, whose targets are None ({type(error).__name__}: {error}); "
                f"give inputs to trainer.Predictor(run).answer(inputs) in Python",
            ) from error
        return inputs

    def _answers_for(self, inputs: Any) -> list[Answer]:
        inputs = self.normalize(send_to_device(inputs, self.device))
        output = self._forward.predict(self.module, MicroBatch(0, inputs, None))
        answer = self.task.answer(output)
        if answer is None:
            raise ConfigError("loss.name", unknown_answer(self.config.loss.name))
        return answer.samples()

    def _build_model(self) -> nn.Module:
        shape = self.signature.shape or []
        return build_model(
            # The run's own weights are loaded next.
            replace(self.config.model, weights=None),
            seed=self.config.run.seed,
            num_classes=self.signature.num_classes,
            in_channels=shape[0] if len(shape) == 3 else None,
        )

    def _load_weights(self, run: Path) -> None:
        tensors, _ = best_model.load(run)
        try:
            self.module.load_state_dict(
                checkpoint.with_extra_state(self.module, tensors)
            )
        except RuntimeError as error:
            name = self.config.model.name
            reason = str(error).strip().splitlines()[-1].strip()
            raise LockstepError(
                f"{name}, built as its config says, does not fit the weights of {run} ({reason})"
            ) from None

    def _load_files(
        self, paths: Sequence[Path]
    ) -> Iterator[list[MicroBatch | DataError]]:
        """Batches of files. Each file is loaded by itself, so that one that cannot be read does not fail its batch."""
        config = self.config
        transform = build_transforms("data.val_transforms", config.data.val_transforms)
        files = _ImageFiles(paths, self._file_channels(), config.data)
        dataset = KeyedDataset(
            files, transform, seed=config.run.seed, purpose="predict"
        )
        loader = WorkerLoader(
            dataset,
            sampler=[Request(0, 0, np.array([i])) for i in range(len(paths))],
            batch_size=config.batch.eval_size,
            collate_fn=list,
            num_workers=max(0, min(config.data.workers, len(paths) - 1)),
            # Without one, the loader draws from the caller's.
            generator=torch.Generator(),
        )
        return iterate(loader, dataset) if loader.num_workers else iter(loader)

    def _file_channels(self) -> int:
        """Channels that files are decoded to: as many as the run's own images had."""
        channels = self.signature.channels
        if channels in (1, 3):
            return channels
        content = "no images" if channels is None else f"images of {channels} channels"
        raise ConfigError(
            "data.name",
            f"{self.config.data.name} holds {content}; only grey and colour files are read",
        )

    def _check_image(
        self, path: Path, item: MicroBatch | DataError
    ) -> Tensor | DataError:
        """The image, `(1, C, H, W)`, if its shape and dtype are those of the validation data; else an error."""
        if isinstance(item, DataError):
            return item
        image: Tensor = item.inputs
        dtype = dtype_name(image.dtype)
        expected_dtype, expected = _image_of(self.signature)
        if dtype != (expected_dtype or dtype):
            return DataError(
                f"{path} is {dtype} after data.val_transforms, and the model was validated on {expected_dtype}; "
                f"set data.val_transforms to give that, as {{name: ToDtype, dtype: float32, scale: true}} does"
            )
        shape = list(image.shape[1:])
        if expected is not None and shape != expected:
            return DataError(
                f"{path} is {_format_shape(shape)} after data.val_transforms, and the model was validated on "
                f"{_format_shape(expected)}; set data.val_transforms to give that, as "
                f"{{name: Resize, size: {expected[1:]}}} does"
            )
        return image


def _image_of(signature: Signature) -> tuple[str | None, list[int] | None]:
    """The dtype and the shape that an image must have, each None where any will do."""
    if signature.form == "list":
        return signature.dtype, None
    parts = list((signature.parts or {}).values())
    if len(parts) == 1:
        return parts[0]["dtype"], parts[0]["shape"]
    return signature.dtype, signature.shape


class _ImageFiles:
    """Image files as a data set. `KeyedDataset` names a file by `paths` when it cannot be read."""

    def __init__(
        self, paths: Sequence[Path], channels: int, section: DataConfig
    ) -> None:
        self.paths = paths
        self._reading = ImageReading.of(section)
        self._channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._reading.read(self.paths[index], self._channels)
        return image, 0  # a target, which every sample must have


def unknown_answer(loss: str) -> str:
    """Why a model that `loss` trained has no answer for an image, and what to do."""
    return (
        f"what a model that {loss} trained answers is not known; write a trainer.Task with `answer`, or with "
        f"`probabilities` if it is a classifier"
    )


def _device_of_one_process(precision: str) -> torch.device:
    processes = launcher.world_size()
    # Before they join, or one could end while another still connects to it.
    if processes > 1:
        raise ConfigError(
            "WORLD_SIZE",
            f"{processes} processes were started, and one predicts; start it alone",
        )
    return Ranks(precision).device


def _format_shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
