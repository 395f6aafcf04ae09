"""A loader for each set that a run is evaluated on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainer.config.data_section import DataConfig
from trainer.config.evaluation_sets import (
    EvaluationSetConfig,
    test_set,
    validation_sets,
)
from trainer.data.datasets import Datasets
from trainer.data.loading import Loader, build_loader


def evaluation_loaders(
    section: DataConfig,
    data: Datasets,
    val_loader: Loader | None,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Loader]:
    """The loaders by `val` or `val/<name>`, and `test`; `val_loader` is that of a single validation set.

    What transforms draw for a sample depends on its id alone, so samples of one id in several sets get the same.
    """
    loaders: dict[str, Loader] = {}
    sections = _sections(section)
    for phase, dataset in data.evaluated().items():
        if phase == "val" and val_loader is not None:
            loaders[phase] = val_loader
            continue
        transforms, key = section.val_transforms, "data.val_transforms"
        own = sections.get(phase)
        if own is not None and own.transforms is not None:
            transforms = own.transforms
            key = f"data.{phase.replace('/', '.')}.transforms"
        loaders[phase] = build_loader(
            section,
            dataset,
            "val",
            transforms,
            seed=seed,
            device=device,
            dtype=dtype,
            label=phase,
            transforms_key=key,
        )
    return loaders


def loader_as_files(
    section: DataConfig, loaders: Mapping[str, Loader]
) -> Loader | None:
    """A validation loader with `data.val_transforms`, which files to predict go through; else the first; else None."""
    validation = {phase: loaders[phase] for phase in loaders if phase != "test"}
    sections = _sections(section)
    for phase, loader in validation.items():
        if phase not in sections or sections[phase].transforms is None:
            return loader
    return next(iter(validation.values()), None)


def _sections(section: DataConfig) -> dict[str, EvaluationSetConfig]:
    sections = {}
    for name, item in validation_sets(section.val).items():
        sections[f"val/{name}"] = item
    test = test_set(section.test)
    return sections if test is None else sections | {"test": test}
