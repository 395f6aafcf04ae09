"""Transforms, torchvision's v2 and users' own, from a config's list of `{name: …, argument: value, …}`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainer.config.registry import build, resolve
from trainer.errors import ConfigError, nearest

DTYPES = ("uint8", "int64", "float16", "bfloat16", "float32", "float64")


def build_transforms(
    key: str, items: list[dict[str, Any]]
) -> Callable[..., Any] | None:
    """The transforms that the list at `key` describes, as one callable; None for an empty list.

    A name is a class of `torchvision.transforms.v2`, or an import path to a class or to a function that returns a
    transform. For v2 classes an `interpolation`, a `policy` or a `dtype` is written as text, and `transforms`, for a
    class that takes others (RandomApply, RandomChoice, …), is again such a list.
    """
    transforms = _build_all(key, items)
    if not transforms:
        return None
    if len(transforms) == 1:
        return transforms[0]
    from torchvision.transforms import v2

    composed: Callable[..., Any] = v2.Compose(transforms)
    return composed


def _build_all(key: str, items: Any) -> list[Callable[..., Any]]:
    if not isinstance(items, list):
        raise ConfigError(
            key,
            f"{items} is not a list of transforms such as {{name: RandomCrop, size: 32}}",
        )
    return [_build(f"{key}[{index}]", item) for index, item in enumerate(items)]


def _build(key: str, item: Any) -> Callable[..., Any]:
    from torchvision.transforms import v2

    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise ConfigError(
            f"{key}.name", f"is missing in {item}; write {{name: RandomCrop, size: 32}}"
        )
    arguments = dict(item)
    name = arguments.pop("name")
    target = _resolve(key, name)
    if target in (v2.MixUp, v2.CutMix):
        raise ConfigError(
            f"{key}.name",
            f"{name} mixes a batch's samples, and a transform sees one sample alone; set train.mix instead",
        )
    if isinstance(target, type) and issubclass(target, v2.Transform):
        for argument, value in arguments.items():
            arguments[argument] = _value(f"{key}.{argument}", argument, value)
    transform: Callable[..., Any] = build(key, target, arguments)
    if not callable(transform):
        raise ConfigError(
            f"{key}.name",
            f"{name} gives a {type(transform).__name__}, which cannot be called",
        )
    return transform


def _resolve(key: str, name: str) -> Any:
    if "." in name:
        return resolve(key, name, {})
    known = transforms_by_name()
    if name in known:
        return known[name]
    raise ConfigError(
        f"{key}.name",
        f'"{name}" is no v2 transform, nor an import path{nearest(name, known)}',
    )


def transforms_by_name() -> dict[str, type]:
    """torchvision's v2 transforms."""
    from torchvision.transforms import v2

    return {
        name: member
        for name, member in vars(v2).items()
        if isinstance(member, type) and issubclass(member, v2.Transform)
    }


def _value(key: str, argument: str, value: Any) -> Any:
    """An argument of a v2 class, from the way it is written in YAML."""
    from torchvision.transforms.v2 import AutoAugmentPolicy, InterpolationMode

    if argument == "transforms":
        return _build_all(key, value)
    if not isinstance(value, str):
        return value
    match argument:
        case "interpolation":
            return _choose(key, value, {mode.value: mode for mode in InterpolationMode})
        case "policy":
            return _choose(
                key, value, {policy.value: policy for policy in AutoAugmentPolicy}
            )
        case "dtype":
            return _choose(key, value, {name: getattr(torch, name) for name in DTYPES})
    return value


def _choose(key: str, value: str, choices: dict[str, Any]) -> Any:
    if value not in choices:
        raise ConfigError(
            key,
            f'"{value}" is not one of {", ".join(choices)}{nearest(value, choices)}',
        )
    return choices[value]
