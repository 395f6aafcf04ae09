"""Configs as nobody means them: wrong types, extreme values and wrong structures, drawn by a seed."""

from __future__ import annotations

import random
from typing import Any, Literal, get_args, get_origin

from trainer.config.fields import Key, declared_keys, is_union
from trainer.config.schema import SECTIONS

# A run of a fraction of a second.
BASE = {
    "data": {
        "name": "fake",
        "size": 12,
        "val_size": 4,
        "image_size": 8,
        "num_classes": 3,
    },
    "batch": {"size": 4},
    "train": {"epochs": 1},
    "run": {"figures": False},
    "wandb": {"mode": "disabled"},
}
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 10**20, 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), -float("inf")),
    *("", "x", ".", "..", ".a", "a.", "a..b", "a/b", "é", "\0", "\ud800", "a" * 300),
    *("torch.nn", "torch.nn.Linear", "builtins.int", "${x}", "1e3"),
    *([], [1, 2], ["x"], [None], [[]], [0.5], [{"name": "x"}], [{"size": 3}]),
    *({}, {"a": 1}, {"name": [1]}, {1: 2}, {"name": "x"}),
]
# Keys of components, which no section declares.
ARGUMENTS = {
    "data": ["size", "image_size", "channels", "num_classes", "no_such"],
    "model": ["width", "no_such"],
    "loss": ["label_smoothing", "weight", "ignore_index", "reduction", "no_such"],
    "optimizer": ["momentum", "weight_decay", "nesterov", "no_such"],
    "schedule": ["step_size", "gamma", "milestones", "power", "no_such"],
}
TRANSFORMS: list[Any] = [
    [{"name": "Grayscale"}],
    [{"name": "Resize", "size": 0}],
    [{"name": "Resize", "size": [2, 2]}],
    [{"name": "RandomCrop", "size": 100}],
    [{"name": "Normalize", "mean": [0], "std": [0]}],
    [{"name": "ToPILImage"}],
    [{"name": "FiveCrop", "size": 4}],
    [{"name": "CutMix"}],
    [{"name": "torch.nn.Flatten"}],
    [{"name": "functional"}],
]
# What is right, or nearly, and makes odd pairs.
SPECIAL: dict[str, list[Any]] = {
    "data.train_transforms": TRANSFORMS,
    "data.val_transforms": TRANSFORMS,
    "data.batch_transforms": TRANSFORMS,
    "data.name": ["digits", "folder", "torch.utils.data.TensorDataset"],
    "model.name": ["torch.nn.Flatten", "torch.nn.Identity", "torch.relu"],
    "model.head": ["head", "classifier", "0"],
    "model.freeze": ["backbone", ["0"]],
    "model.unfreeze": [{1: "backbone"}, {"²": "backbone"}, {0: []}, {1: 1}],
    "model.weights": ["DEFAULT", "/dev/null", "/"],
    "loss.name": ["mse", "bce_with_logits", "torch.nn.CTCLoss", "torch.nn.L1Loss"],
    "optimizer.lr": [1e300, 1e-320],
    "optimizer.name": ["adamw", "torch.optim.LBFGS", "torch.optim.SparseAdam"],
    "schedule.name": ["cosine", "one_cycle", "plateau", "multi_step"],
    "best.metric": ["lr", "train/loss", "val/no_such", "train/"],
    "observers": [[{"name": "torch.nn.Linear"}], [1], {"name": "a.b"}],
}
# What takes long, or leaves the test's own directory.
LEFT_OUT: dict[str, list[Any]] = {
    "wandb.mode": ["auto", "online"],
    "wandb": [None, {}, []],
    "train.compile": [True],
    "data.workers": [1, 2, 7, 10**20],
    "run.dir": ["", ".", "..", "a/b"],
    "run": [None, {}],
}


def draw_overrides(draw: random.Random) -> dict[str, Any]:
    """One to three dotted keys, or whole sections, and a value for each."""
    keys = _keys()
    names = draw.sample(sorted(keys), draw.choice([1, 1, 2, 2, 3]))
    return {name: draw.choice(_values(name, keys[name])) for name in names}


def _keys() -> dict[str, Key | None]:
    keys: dict[str, Key | None] = {"observers": None}
    for section, cls in SECTIONS.items():
        keys[section] = None
        for name, key in declared_keys(cls).items():
            keys[f"{section}.{name}"] = key
        for name in ARGUMENTS.get(section, []):
            keys[f"{section}.{name}"] = None
    return keys


def _values(name: str, key: Key | None) -> list[Any]:
    values = VALUES + 4 * SPECIAL.get(name, [])
    if key is not None:
        hints = get_args(key.hint) if is_union(key.hint) else [key.hint]
        for hint in hints:
            if get_origin(hint) is Literal:
                values += 4 * list(get_args(hint))
    left_out = LEFT_OUT.get(name, [])
    # By type, too: True is 1.
    kinds = {(type(value), repr(value)) for value in left_out}
    return [value for value in values if (type(value), repr(value)) not in kinds]
