"""What `torch.save` wrote, read without running code: tensors and plain values, and a blank in the place of the rest.

Training checkpoints hold more than weights: torchvision's and timm's an `argparse.Namespace`, others objects of classes
of their own. torch's weights-only reader refuses a whole file for one of them. Here each class that it does not know is
given to it as one that ignores whatever it is made of. Nothing that the file names is imported or called.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

# Plain records of settings, read as they are.
HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath]
UNSUPPORTED = re.compile(r"GLOBAL ([\w.]+)")
# Of an old file, whose names are found one by one.
MOST_NAMES = 50


class _BlankMapping:
    """Becomes an empty mapping, whatever it is made with: also what dictionaries of another class are filled into."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _BlankList(list[Any]):
    """An empty list, whatever it is made with."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class _BlankObject:
    """An object without anything, whatever it is made with."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# Each is tried: a mapping takes no state of slots, an object no items.
BLANKS: tuple[type, ...] = (_BlankMapping, _BlankObject)
KNOWN_BLANKS: dict[str, type] = {"collections.deque": _BlankList, "numpy": _BlankObject}


def load_tensors(path: Path) -> tuple[Any, list[str]]:
    """What is in the file, on the CPU, and the names of the classes in the place of whose objects there are blanks.

    Raises `pickle.UnpicklingError` for a file that even so cannot be read as tensors and plain values.
    """
    with torch.serialization.safe_globals(HARMLESS):
        names: set[str] = set()
        # Not of files from before torch 1.6, which are no archives.
        with suppress(ValueError):
            names.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        try:
            return _load(path, names, BLANKS[0]), sorted(names)
        except pickle.UnpicklingError as error:
            first = error
        except (AttributeError, TypeError, ValueError) as error:
            if not names:
                raise
            first = pickle.UnpicklingError(str(error))
        with suppress(pickle.UnpicklingError, AttributeError, TypeError, ValueError):
            return _load(path, names, BLANKS[1]), sorted(names)
        raise first


def _load(path: Path, names: set[str], blank: type) -> Any:
    """The file with `blank` for the classes in `names`, to which those are added that turn up on the way."""
    for _ in range(MOST_NAMES):
        with torch.serialization.safe_globals(_stand_ins(names, blank)):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                name = _refused_class(str(error))
                if name is None or name in names:
                    raise
                names.add(name)
    raise pickle.UnpicklingError(f"GLOBAL {name}: the file names too many classes")


def _refused_class(message: str) -> str | None:
    """The path of the class for which torch refuses a file; None if it refuses it for something else."""
    match = UNSUPPORTED.search(message)
    if match is None or "was not an allowed" not in message:
        return None
    name = match[1]
    return name if "." in name else f"builtins.{name}"


def _stand_ins(names: set[str], blank: type) -> list[Any]:
    stand_ins = []
    for name in sorted(names):
        package = name.partition(".")[0]
        known = KNOWN_BLANKS.get(name) or KNOWN_BLANKS.get(package)
        stand_ins.append((known or blank, name))
    return stand_ins
