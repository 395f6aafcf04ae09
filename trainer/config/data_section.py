"""What a run is trained and evaluated on: the section `data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.evaluation_sets import test_set, validation_sets
from trainer.config.fields import ComponentSection, key, show
from trainer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig(ComponentSection):
    SECTION = "data"

    name: str = key(
        "digits",
        "digits, folder, cifar10, mnist, fake, shapes, or an import path to a map-style dataset",
    )
    root: str | None = key(
        None, "folder that holds the data set, where it has files", path=True
    )
    cache: float | Literal["decoded"] = key(
        0.0,
        "memory of each process for decoded images of a folder, in GiB; decoded = all of them in files of "
        "data.cache_dir, which every process and every later run maps (docs/cache.md)",
        minimum=0,
    )
    cache_dir: str | None = key(
        None, "folder that holds the files of data.cache=decoded", path=True
    )
    short_side: int | Literal["auto", "full"] = key(
        "auto",
        "larger images of a folder are made so small once they are decoded, before the transforms; full = never; "
        "auto = with data.cache=decoded what the transforms need, else full",
        unit="pixels",
        minimum=1,
    )
    max_pixels: int = key(
        100_000_000,
        "largest image file that is decoded; one that says it is larger is refused before memory is asked for",
        unit="pixels",
        minimum=1,
    )
    decode: Literal["cpu", "device"] = key(
        "cpu",
        "where training images of a folder are decoded: device = JPEG files on the GPU that trains, by nvJPEG, before "
        "data.batch_transforms (docs/on-device.md)",
    )
    decode_short_side: int | None = key(
        None,
        "JPEG files are decoded at a half, a quarter or an eighth of their size where their shorter side stays at "
        "least this long: faster, on other pixels (docs/image-data.md); null = in full",
        unit="pixels",
        minimum=1,
    )
    bad_samples: Literal["stop", "quarantine"] = key(
        "stop",
        "a sample that cannot be read or transformed ends the run, or is left out of it and listed in bad_samples.txt",
    )
    max_bad: int = key(
        10,
        "with data.bad_samples=quarantine: if more samples than this are bad, the run ends",
        unit="samples",
        minimum=1,
    )
    val_fraction: float | None = key(
        None,
        "validate on this share of the training samples, the same of each class where they are known; null = on the "
        "data set's own validation part",
        minimum=0,
    )
    split_seed: int = key(
        0,
        "determines which samples data.val_fraction takes; run.seed does not",
        minimum=0,
    )
    workers: int = key(
        0, "loader processes of each rank; 0 loads in the rank itself", minimum=0
    )
    prefetch: int = key(4, "micro-batches each loader process keeps ready", minimum=1)
    sampler: dict[str, Any] = key(
        {},
        "which training samples an epoch takes: {name: random, subset, balanced, weighted, repeated, or an import path "
        "to a pure function of labels, seed and epoch, with its arguments}; {} = each once (docs/samplers.md)",
    )
    epoch_samples: int | None = key(
        None,
        "length of an epoch, for data.sampler; null = as the sampler has it",
        unit="samples",
        minimum=1,
    )
    train_transforms: list[dict[str, Any]] = key(
        [],
        "torchvision v2 transforms of training images, in order: {name: RandomCrop, size: 32}",
    )
    val_transforms: list[dict[str, Any]] = key([], "the same for validation images")
    batch_transforms: list[dict[str, Any]] = key(
        [],
        "random transforms of whole micro-batches of training images, on the device, after train_transforms: "
        "{name: RandomCrop, size: 32, padding: 4} (docs/on-device.md)",
    )
    on_device: bool = key(
        False,
        "keep all samples, after their transforms, on the device that trains; they must fit there and have one shape",
    )
    val: dict[str, Any] = key(
        {},
        "validation sets by name, each as data unless it says otherwise: {clean: {}, shifted: {root: PATH}}",
    )
    test: dict[str, Any] | None = key(
        None,
        "a set that the best weights are evaluated on once, at the end: {folder: test}",
    )
    columns: list[list[str] | str] | None = key(
        None,
        "of rows with named columns, the input's and the target's: [image, label]; several inputs by name: "
        "[[image, age], label]; null = guessed where there is one of each",
    )
    collate: str | None = key(
        None,
        "what makes a batch of samples: lists (each by itself), or an import path to a function "
        "[(input, target), …] → (inputs, targets); null = as the loss takes them, else torch's default_collate",
    )
    mean: list[float] | None = key(
        None, "subtracted from each channel of the image scaled to [0, 1]"
    )
    std: list[float] | None = key(
        None, "divides each channel after the mean is subtracted"
    )

    def __post_init__(self) -> None:
        if isinstance(self.sampler, str):
            raise ConfigError(
                "data.sampler",
                f"{show(self.sampler)} is a name alone; write {{name: {self.sampler}}}, or data.sampler.name",
            )
        super().__post_init__()
        if self.cache == "decoded" and self.cache_dir is None:
            raise ConfigError(
                "data.cache_dir",
                "is not set; data.cache=decoded needs a folder for the decoded images, on a fast disk with room for "
                "them (docs/cache.md says how much)",
            )
        fraction = self.val_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise ConfigError(
                "data.val_fraction", f"{fraction:g} is not above 0 and below 1"
            )
        if not all(deviation > 0 for deviation in self.std or []):
            raise ConfigError(
                "data.std",
                f"{self.std} is not all above 0: channels are divided by it",
            )
        validation_sets(self.val)
        test_set(self.test)
        # An empty mapping would be no key of a flat list of keys, by which runs are compared.
        sets = {name: entry or {"part": "val"} for name, entry in self.val.items()}
        object.__setattr__(self, "val", sets)
