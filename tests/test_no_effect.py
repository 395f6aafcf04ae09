"""Keys that change nothing in a run are named in its header, once each, and no others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    Images,
    Points,
    config,
    conv_net,
    header_of,
    mlp,
)
from tests.test_configs import CONFIGS, ROOT, substitutes
from trainer import Trainer
from trainer.config.load import load
from trainer.config.schema import Config
from trainer.core.no_effect import RULES, keys_without_effect
from trainer.data.folder import ImageFolder

pytestmark = pytest.mark.filterwarnings("ignore")

USELESS: dict[str, dict[str, Any]] = {
    "run.resume_changes has": {"run__resume_changes": "allow"},
    "data.split_seed has": {"data__split_seed": 3},
    "data.prefetch has": {"data__prefetch": 2},
    "data.epoch_samples has": {"data__epoch_samples": 103},
    "batch_norm.mode, batch_norm.momentum have": {
        "batch_norm__mode": "frozen",
        "batch_norm__momentum": 0.2,
    },
    "batch_norm.recalibrate, batch_norm.recalibrate_at have": {
        "batch_norm__recalibrate": 2,
        "batch_norm__recalibrate_at": "end",
    },
    "batch.eval_size, train.evaluate_every have": {
        "batch__eval_size": 8,
        "train__evaluate_every": 2,
    },
    "data.max_bad has": {"data__max_bad": 3},
    "data.decode_short_side has": {"data__decode_short_side": 64},
    "train.evaluate_every_steps has": {"train__evaluate_every_steps": 2},
    "train.checkpoint_every, train.checkpoint_every_epochs have": {
        "train__checkpoint_every": 2,
        "train__checkpoint_every_epochs": 2,
        "train__keep_checkpoints": 0,
    },
    "batch.fuse has": {"batch__fuse": 2},
    "train.tf32 has": {"train__tf32": True},
    "train.cudnn_benchmark has": {"train__cudnn_benchmark": True},
    "model.head has": {"model__head": "2"},
    "optimizer.no_weight_decay has": {"optimizer__no_weight_decay": "honour"},
    "schedule.warmup_start has": {"schedule__warmup_start": 0.1},
    "schedule.per has": {"schedule__per": "step"},
    "early_stop.metric, early_stop.min_delta, early_stop.mode have": {
        "early_stop__metric": "train/loss",
        "early_stop__min_delta": 0.1,
        "early_stop__mode": "min",
    },
    "ema.start, ema.every, ema.warmup, ema.evaluate have": {
        "ema__start": 1,
        "ema__every": 2,
        "ema__warmup": True,
        "ema__evaluate": "none",
    },
    "ema.decay, ema.start, ema.every have": {
        "ema__decay": 0.5,
        "ema__start": 7,
        "ema__every": 5,
    },
    "data.cache_dir has": {"data__cache_dir": "cache"},
    "train.max_steps has": {"train__max_steps": 9},
    "train.stop_after has": {"train__stop_after": 9},
    "train.cuda_graphs has": {"train__cuda_graphs": True},
    "train.channels_last has": {"train__channels_last": True},
    "train.mix has": {"train__mix": {"mixup": 0, "prob": 0.5}},
}
# The same keys where they do something.
USEFUL: list[dict[str, Any]] = [
    {"run__resume": "auto", "run__resume_changes": "allow"},
    {"data__workers": 1, "data__prefetch": 2, "data__epoch_samples": 56},
    {"data__bad_samples": "quarantine", "data__max_bad": 3},
    {"batch_norm__momentum": 0.2, "batch__micro_size": 7, "batch__fuse": 2},
    {"batch_norm__mode": "frozen", "train__channels_last": True},
    {"batch_norm__momentum_per": "step", "batch__micro_size": 7},
    {"batch_norm__recalibrate": 2, "batch_norm__recalibrate_at": "end"},
    {"batch__eval_size": 8, "train__evaluate_every": 2},
    {"train__evaluate_every_steps": 8, "train__checkpoint_every": 2},
    {"train__checkpoint_every_epochs": 2},
    {"model__head": "4", "model__freeze": "backbone"},
    {"model__head": "4", "model__num_classes": 7},
    {"schedule__warmup": 1, "schedule__warmup_start": 0.1, "schedule__per": "step"},
    {"schedule__name": "cosine", "schedule__per": "step"},
    {"train__max_steps": 8, "train__stop_after": 8, "train__mix": {"cutmix": 1}},
    {
        "early_stop__patience": 2,
        "early_stop__metric": "val/accuracy",
        "early_stop__min_delta": 0.1,
        "early_stop__mode": "max",
    },
    {
        "ema__decay": 0.5,
        "ema__start": 3,
        "ema__every": 4,
        "ema__warmup": True,
        "ema__evaluate": "instead",
    },
    {"optimizer__no_weight_decay": "honour"},
    {"data__val_fraction": 0.2, "data__split_seed": 3},
    {"data__val_fraction": 0.2, "data__columns": ["picture", "kind"]},
    {"data__decode_short_side": 64},
]


class ImageRows(Images):
    def __getitem__(self, i: int) -> Any:
        image, label = super().__getitem__(i)
        return {"picture": image, "kind": label}


class ImageFiles(ImageFolder):
    """As if of files."""

    def __init__(self) -> None:
        self._images = Images()
        labels = self._images.labels.tolist()
        super().__init__(Path(), [str(index) for index in range(len(labels))], labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._images[index]


def cached_images(folder: Path) -> dict[str, Any]:
    """Changes for a folder of images that is decoded into files."""
    for part in ("train", "val"):
        for name in "abcd":
            (folder / part / name).mkdir(parents=True)
            Image.new("RGB", (5, 5)).save(folder / part / name / "0.png")
    cache_dir = str(folder.parent / "cache")
    keys = {"name": "folder", "root": str(folder), "cache_dir": cache_dir}
    return {f"data__{key}": value for key, value in keys.items()} | {
        "data__cache": "decoded"
    }


def data_for(changes: dict[str, Any]) -> list[Any]:
    if "data__cache" in changes:
        return []
    if "data__columns" in changes:
        return [ImageRows()]
    if "data__decode_short_side" in changes:
        return [ImageFiles()]
    return [Images()] if "data__val_fraction" in changes else [Images(), Images()]


def spared_net() -> nn.Module:
    """A model that asks for no weight decay of a parameter."""
    model = conv_net()
    model.no_weight_decay = lambda: {"0.bias"}  # type: ignore[assignment]
    return model


def lines(settings: Config, model: nn.Module | None, *data: Any) -> list[str]:
    parts = dict(zip(("train_data", "val_data"), data, strict=False))
    return keys_without_effect(Trainer(settings, model=model, **parts).run)


def test_useless_keys_are_named(tmp_path: Path) -> None:
    def all_lines() -> dict[str, list[str]]:
        return {
            start: lines(config(tmp_path, **changes), mlp(), Points())
            for start, changes in USELESS.items()
        }

    (found,) = on_ranks(1, all_lines)
    for start, (line, *others) in found.items():
        assert line.startswith(f"{start} no effect: ") and not others


def test_columns_of_samples_that_are_no_rows(tmp_path: Path) -> None:
    settings = load(overrides=["data.columns=[image, label]", f"run.dir={tmp_path}"])
    (found,) = on_ranks(1, lines, settings, None)
    (line,) = found
    assert line.startswith("data.columns has no effect: ")


def test_a_warmup_longer_than_the_run(tmp_path: Path) -> None:
    changes = {"schedule__per": "step", "schedule__warmup": 99, "train__epochs": 1}
    settings = config(tmp_path, **changes)

    def header() -> dict[str, str]:
        return header_of(Trainer(settings, model=mlp(), train_data=Points()), tmp_path)

    (facts,) = on_ranks(1, header)
    assert facts["note"].startswith("the warmup takes 99 steps and the run ")


def test_useful_keys_are_not(tmp_path: Path) -> None:
    useful = [*USEFUL, cached_images(tmp_path / "images")]

    def all_lines() -> list[list[str]]:
        return [
            lines(config(tmp_path, **changes), spared_net(), *data_for(changes))
            for changes in useful
        ]

    (found,) = on_ranks(1, all_lines)
    assert found == [[]] * len(useful)
    used = {key.replace("__", ".") for changes in useful for key in changes}
    # On a CUDA device.
    used |= {"train.tf32", "train.cudnn_benchmark", "train.cuda_graphs"}
    assert used >= {key for rule in RULES for key in rule.keys}


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"batch_norm__mode": "frozen", "batch_norm__momentum": 0.2}, "momentum has"),
        ({"batch_norm__momentum_per": "step"}, "momentum_per has"),
        ({"batch_norm__recalibrate_at": "end"}, "recalibrate_at has"),
    ],
)
def test_batch_norm(changes: dict[str, Any], start: str, tmp_path: Path) -> None:
    (found,) = on_ranks(
        1, lines, config(tmp_path, **changes), conv_net(), Images(), Images()
    )
    (line,) = found
    assert line.startswith(f"batch_norm.{start} no effect: ")


def test_shipped_configs_have_none(tmp_path: Path) -> None:
    def all_lines() -> dict[str, list[str]]:
        found = {}
        for index, path in enumerate(CONFIGS):
            overrides = [
                *substitutes(path, tmp_path / str(index)),
                f"run.dir={tmp_path}",
            ]
            found[str(path.relative_to(ROOT))] = lines(load(path, overrides), None)
        return found

    (found,) = on_ranks(1, all_lines)
    assert found and not any(found.values()), found
