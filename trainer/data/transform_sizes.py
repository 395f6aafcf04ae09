"""How large transforms want an image, and the keys that must not make it smaller before: it would only be enlarged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from trainer.config.data_section import DataConfig
from trainer.config.evaluation_sets import test_set, validation_sets
from trainer.errors import ConfigError

# Of v2: what they do to an image does not depend on its size, nor changes it, so a Resize after them may come first.
SIZELESS = frozenset(
    {
        "ToImage",
        "ToPILImage",
        "PILToTensor",
        "ToDtype",
        "ConvertImageDtype",
        "RGB",
        "Grayscale",
        "RandomGrayscale",
        "RandomHorizontalFlip",
        "RandomVerticalFlip",
        "ColorJitter",
        "RandomChannelPermutation",
        "RandomPhotometricDistort",
        "RandomInvert",
        "RandomPosterize",
        "RandomSolarize",
        "Normalize",
        "Identity",
    }
)
# Of v2: where a transform says how large it makes an image, unless in `size`.
SIZE_ARGUMENTS = {"RandomShortestSize": "min_size", "RandomResize": "max_size"}


class Listed(NamedTuple):
    """An item of a list of transforms: the key of the list, and its own, such as `data.train_transforms[2]`."""

    list_key: str
    key: str
    item: Any


class AskedSize(NamedTuple):
    """The longest side that a transform makes an image, in pixels, and the key that says so."""

    key: str
    pixels: int


def check_image_sizes(section: DataConfig) -> None:
    """Raise `ConfigError` if images are decoded or made smaller than the transforms first want them."""
    sides = {
        "data.decode_short_side": section.decode_short_side,
        "data.short_side": section.short_side,
    }
    for key, side in sides.items():
        if not isinstance(side, int):
            continue
        for asked in _all_asked_sizes(section):
            if asked.pixels > side:
                raise ConfigError(
                    key,
                    f"{side} is less than the {asked.pixels} pixels of {asked.key}, so images would be made smaller "
                    f"only to be enlarged; set it to {asked.pixels} or more",
                )
    decoded, shrunk = sides.values()
    if isinstance(decoded, int) and isinstance(shrunk, int) and shrunk > decoded:
        raise ConfigError(
            "data.decode_short_side",
            f"{decoded} is less than data.short_side={shrunk}; set it to that or more",
        )


def _all_asked_sizes(section: DataConfig) -> Iterator[AskedSize]:
    for _, transforms in transform_lists(section):
        yield from _asked_sizes(transforms)


def _asked_sizes(transforms: Sequence[Listed]) -> Iterator[AskedSize]:
    """The size that the first sizing transform of a list asks for; with lists within it, each of theirs, too.

    Later ones are given what that one makes. Those of an import path are their author's, and after a transform that
    may change the size in another way, as Pad does, nothing can be said.
    """
    for listed in transforms:
        name, item = name_of(listed.item), listed.item
        if name in SIZELESS:
            continue
        if isinstance(item, dict) and "transforms" in item:
            # They may be left out, as by RandomApply: the next one may be the first, too.
            yield from _asked_sizes(_in(f"{listed.key}.transforms", item["transforms"]))
            continue
        if name and "." not in name:
            pixels = own_size(name, item)
            if pixels is not None:
                yield AskedSize(f"{listed.key}.{_size_argument(name)}", pixels)
        return


def transform_lists(
    section: DataConfig,
) -> Iterator[tuple[str, Sequence[Listed]]]:
    """What the images of each set go through, in order, and the key that it begins with.

    Evaluation sets with transforms of their own come last.
    """
    key = "data.train_transforms"
    train = _in(key, section.train_transforms)
    # A micro-batch goes on where its samples' own transforms end.
    yield key, [*train, *_in("data.batch_transforms", section.batch_transforms)]
    key = "data.val_transforms"
    yield key, _in(key, section.val_transforms)
    sets = {}
    for name, item in validation_sets(section.val).items():
        sets[f"val.{name}"] = item
    test = test_set(section.test)
    if test is not None:
        sets["test"] = test
    for name, item in sets.items():
        if item.transforms is not None:
            key = f"data.{name}.transforms"
            yield key, _in(key, item.transforms)


def _in(key: str, items: Any) -> list[Listed]:
    """The items of a list; none of what is no list, which is refused elsewhere."""
    if not isinstance(items, list):
        return []
    return [Listed(key, f"{key}[{index}]", item) for index, item in enumerate(items)]


def name_of(item: Any) -> str:
    """The name of one item of a list of transforms; "" for what is no such item, which is refused elsewhere."""
    return str(item.get("name", "")) if isinstance(item, dict) else ""


def own_size(name: str, arguments: dict[str, Any]) -> int | None:
    """The longest side, in pixels, that a transform of v2 asks for in its own arguments; None if it asks for none."""
    return _largest(arguments.get(_size_argument(name)))


def _size_argument(name: str) -> str:
    return SIZE_ARGUMENTS.get(name, "size")


def _largest(size: Any) -> int | None:
    """The larger of one or several numbers; None for anything else, of which the transform itself will tell."""
    sizes = size if isinstance(size, list) else [size]
    for number in sizes:
        if type(number) is not int or number <= 0:
            return None
    return max(sizes, default=None)
