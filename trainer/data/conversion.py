"""A data set's samples as pairs of tensors, where what they mean is plain; else an error that says what they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from trainer.errors import DataError
from trainer.exact.structures import dtype_name

# What rows with named columns call an image and its target, as Hugging Face's data sets do.
IMAGE_KEYS = ("image", "img", "pixel_values")
TARGET_KEYS = ("label", "labels", "target", "mask")

CHANNELS = (1, 3, 4)  # grey, colour, and colour with transparency
# PIL modes whose numbers are no brightness, and the mode that shows the same.
SHOWN_AS = {"P": "RGB", "PA": "RGBA", "1": "L", "CMYK": "RGB", "YCbCr": "RGB"}


def as_pair(sample: Any, name: str) -> tuple[Any, Any]:
    """A sample as (input, target). A row such as {"image": …, "label": …} is one, too.

    Raises `DataError`, which calls the sample `name`, for anything else.
    """
    if isinstance(sample, Mapping):
        return _pair_of_row(sample, name)
    # They can be unpacked, into what they do not mean.
    if not isinstance(sample, str | bytes | Tensor | np.ndarray):
        try:
            image, target = sample
        except (TypeError, ValueError):
            pass
        else:
            return image, target
    raise DataError(
        f"{name} is {describe(sample)}; a sample is a pair (input, target), or a row with one of "
        f"{', '.join(IMAGE_KEYS)} and one of {', '.join(TARGET_KEYS)}"
    )


def _pair_of_row(row: Mapping[Any, Any], name: str) -> tuple[Any, Any]:
    images = [key for key in IMAGE_KEYS if key in row]
    targets = [key for key in TARGET_KEYS if key in row]
    if len(images) == 1 and len(targets) == 1:
        return row[images[0]], row[targets[0]]
    raise DataError(
        f"{name} is a row of {', '.join(map(str, row))}, which does not say what is input and what is target; name the "
        f"two columns in data.columns, or return a pair (input, target), or a row with one of {', '.join(IMAGE_KEYS)} "
        f"and one of {', '.join(TARGET_KEYS)}"
    )


def target_key(columns: Mapping[str, Any]) -> str | None:
    """The one column that holds the target; None if none or several do."""
    keys = [key for key in TARGET_KEYS if key in columns]
    return keys[0] if len(keys) == 1 else None


def is_pil(value: Any) -> bool:
    """True for a PIL image. Where PIL was never imported, there are none."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def is_numeric_array(value: Any) -> TypeGuard[np.ndarray[Any, Any]]:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"


def input_as_tensor(value: Any) -> Any:
    """A PIL image or a NumPy array as a tensor: images `(C, H, W)`. Anything else as it is."""
    if isinstance(value, Tensor):
        return value
    if is_pil(value):
        mode = SHOWN_AS.get(value.mode)
        if mode is not None:
            value = value.convert(mode)
        return _pil_as_tensor(value)
    if is_numeric_array(value):
        return array_as_tensor(value)
    return _with_pil_as_tensors(value, input_as_tensor)


def array_as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor. Bytes `(H, W, C)`, as images are decoded to, become `(C, H, W)`."""
    if array.dtype == np.uint8 and array.ndim == 3:
        first, _, last = array.shape
        if last in CHANNELS and first not in CHANNELS:
            array = array.transpose(2, 0, 1)
    return _from_numpy(array)


def target_as_tensor(value: Any) -> Any:
    """A PIL image (a mask) `(H, W)` or a NumPy array as a tensor, its numbers as they are. Anything else as it is."""
    if isinstance(value, int | Tensor):
        return value
    if is_pil(value):
        # The values of a palette image are class ids, so it is not converted.
        is_binary = value.mode == "1"
        tensor = _pil_as_tensor(value.convert("L") if is_binary else value)
        if is_binary:
            tensor = tensor > 0
        return tensor[0] if len(tensor) == 1 else tensor
    if is_numeric_array(value):
        return _from_numpy(value)
    return _with_pil_as_tensors(value, target_as_tensor)


def _with_pil_as_tensors(value: Any, convert: Callable[[Any], Any]) -> Any:
    """A dict with every PIL image in it converted; anything else as it is."""
    if not isinstance(value, Mapping) or not any(map(is_pil, value.values())):
        return value
    converted = {}
    for key, entry in value.items():
        converted[key] = convert(entry) if is_pil(entry) else entry
    return converted


def _pil_as_tensor(image: Any) -> Tensor:
    from torchvision.transforms.v2.functional import pil_to_tensor

    tensor: Tensor = pil_to_tensor(image)
    return tensor


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """Also of a flipped view or of another machine's byte order, which torch does not take."""
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array)


def describe(value: Any) -> str:
    """What a value is, for a message: its type, with its shape, length or text."""
    kind = type(value).__name__
    if isinstance(value, Tensor | np.ndarray):
        dtype = dtype_name(value.dtype)
        return f"a {kind} {tuple(value.shape)} of {dtype}"
    if isinstance(value, str):
        return f'the text "{value[:40]}"'
    if isinstance(value, Mapping):
        first_keys = list(value)[:8]
        return f"a {kind} of {', '.join(map(str, first_keys))}"
    if isinstance(value, list | tuple):
        return f"a {kind} of {len(value)}"
    if value is None:
        return "None"
    return f"a {kind}"


def describe_parts(value: Any) -> str:
    """The same, with what each entry of a dict or of a short list is."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {describe(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple) and 0 < len(value) <= 4:
        entries = ", ".join(map(describe, value))
        return f"{describe(value)} ({entries})"
    return describe(value)
