"""A run's best model, asked about image files: built from the run directory alone, without the run's data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainer.components.models import build_model
from trainer.components.task import build_task
from trainer.core.forward import Forward
from trainer.core.precision import Precision
from trainer.data.folder import decode
from trainer.data.loading import Normalize
from trainer.data.samples import KeyedDataset, MicroBatch, Request
from trainer.data.transforms import build_transforms
from trainer.errors import ConfigError, DataError, LockstepError
from trainer.exact.determinism import make_deterministic
from trainer.process.ranks import Ranks
from trainer.storage import checkpoint, signature
from trainer.storage.run_directory import read_config


class Predictor:
    """The best model of the run at `run`, with its validation transforms, normalisation and class names.

    A model that was given to the run's `Trainer` instead of being named in its config must be given here too.
    """

    def __init__(self, run: Path, overrides: Sequence[str] = (), *, model: nn.Module | None = None) -> None:
        read_config(run)  # which says so where `run` is no run directory
        best = checkpoint.best_directory(run)
        config = self.config = read_config(best, overrides)
        self.signature = signature.read(best)
        if config.run.reproducibility == "bitwise":
            make_deterministic()
        ranks = Ranks(config.train.precision)
        if ranks.count > 1:
            raise ConfigError("WORLD_SIZE", f"{ranks.count} processes were started, and one predicts; start it alone")
        self.device = ranks.device
        precision = Precision(config.train.precision, self.device)
        self.module = (model or self._build()).to(self.device, precision.dtype).eval()
        self._load(run)
        self.task = build_task(config.loss, self.signature.num_classes).to(self.device, precision.dtype)
        self.normalize = Normalize(config.data.mean, config.data.std, precision.dtype).to(self.device)
        self._forward = Forward(self.task, precision, self.device, config.run.seed)

    def _build(self) -> nn.Module:
        shape, config = self.signature.shape, self.config
        return build_model(
            replace(config.model, weights=None),  # the run's own come next
            seed=config.run.seed,
            num_classes=self.signature.num_classes,
            in_channels=shape[0] if shape is not None and len(shape) == 3 else None,
        )

    def _load(self, run: Path) -> None:
        try:
            self.module.load_state_dict(checkpoint.load_best(run)[0])
        except RuntimeError as error:
            name, reason = self.config.model.name, str(error).strip().splitlines()[-1].strip()
            raise LockstepError(
                f"{name}, built as its config says, does not fit the weights of {run} ({reason})"
            ) from None

    @torch.inference_mode()
    def classify(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Tensor | DataError]]:
        """Each file in order with each class's probability, float32 `(C,)` on the CPU, or what is wrong with it."""
        waiting = iter(paths)
        for batch in self._load_files(paths):
            of = list(islice(waiting, len(batch)))
            checked = [self._checked(path, item) for path, item in zip(of, batch, strict=True)]
            good = [item for item in checked if isinstance(item, Tensor)]
            found = iter(self._probabilities(torch.cat(good)) if good else ())
            for path, item in zip(of, checked, strict=True):
                yield path, item if isinstance(item, DataError) else next(found)

    def _load_files(self, paths: Sequence[Path]) -> DataLoader[list[MicroBatch | DataError]]:
        """Batches of the files, each file alone, so that one that cannot be read leaves the others be."""
        section = self.config.data
        transform = build_transforms("data.val_transforms", section.val_transforms)
        files = _Files(paths, self._channels())
        return DataLoader(
            KeyedDataset(files, transform, seed=self.config.run.seed, purpose="predict"),
            sampler=[Request(0, 0, np.array([i])) for i in range(len(paths))],
            batch_size=self.config.batch.eval_size,
            collate_fn=list,
            num_workers=min(section.workers, len(paths) - 1),
            generator=torch.Generator(),
        )

    def _channels(self) -> int:
        channels = self.signature.channels
        if channels not in (1, 3):
            held = "no images" if channels is None else f"images of {channels} channels"
            raise ConfigError("data.name", f"{self.config.data.name} holds {held}; only grey and colour files are read")
        return channels

    def _checked(self, path: Path, item: MicroBatch | DataError) -> Tensor | DataError:
        """The image `(1, C, H, W)`, if it is like those that the model was validated on."""
        if isinstance(item, DataError):
            return item
        images: Tensor = item.inputs
        shape, dtype = list(images.shape[1:]), str(images.dtype).removeprefix("torch.")
        known = self.signature
        if dtype != known.dtype:
            return DataError(
                f"{path} is {dtype} after data.val_transforms, and the model was validated on {known.dtype}; "
                f"set data.val_transforms to give that, as {{name: ToDtype, dtype: float32, scale: true}} does"
            )
        if shape != known.shape and known.shape is not None:
            now, then = (" × ".join(map(str, of)) for of in (shape, known.shape))
            return DataError(
                f"{path} is {now} after data.val_transforms, and the model was validated on {then}; "
                f"set data.val_transforms to give that, as {{name: Resize, size: {known.shape[1:]}}} does"
            )
        return images

    def _probabilities(self, images: Tensor) -> Tensor:
        batch = MicroBatch(0, self.normalize(images.to(self.device)), None)
        shares = self.task.probabilities(self._forward.output(self.module, batch))
        if shares is None:
            raise ConfigError("loss.name", f"{self.config.loss.name} makes no classifier, whose classes could be named")
        return shares.float().cpu()


class _Files:
    """Image files as a data set; `KeyedDataset` names `paths` in what it says of them."""

    def __init__(self, paths: Sequence[Path], channels: int) -> None:
        self.paths = paths
        self._channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return decode(self.paths[index], self._channels), 0
