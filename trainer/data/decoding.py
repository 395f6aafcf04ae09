"""Image files as tensors: by torchvision, and by Pillow the kinds that torchvision does not read."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.names import printable
from trainer.errors import DataError, data_error, may_pass

IMAGE_TYPES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
)
# How the files begin that Pillow decodes, and what it calls them.
BY_PILLOW = {b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
AVIF = (b"ftypavif", b"ftypavis")  # from byte 4 on
# An extended WebP file says in byte 20 what it has besides pixels.
WEBP_EXTENDED = b"VP8X"
WEBP_HAS_EXIF = 0x08
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


def decode(path: Path, channels: int = 3) -> Tensor:
    """The image file, uint8 `(channels, H, W)`, in colour (3) or grey (1), turned upright by its EXIF data.

    Raises `DataError` if it cannot be decoded or is an animation.
    """
    data = _read(path)
    try:
        kind = _kind_for_pillow(data)
        if kind is None:
            return _decode_by_torchvision(data, channels)
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        # Without torchvision's own file and line.
        reason = re.sub(r"^.*\.cpp:\d+, ", "", first_line)
        raise _cannot_decode(path, reason, error) from None
    except _Animation as animation:
        raise _is_animation(path, animation.images) from None
    return _decode_by_pillow(path, data, kind, channels)


def _read(path: Path) -> Tensor:
    # Not torchvision's `read_file`, which takes no name that is not UTF-8.
    try:
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    except OSError as error:
        raise _cannot_decode(path, error.strerror or str(error), error) from None


class _Animation(Exception):
    def __init__(self, images: int) -> None:
        super().__init__(images)
        self.images = images


def _cannot_decode(path: Path, reason: str, cause: Exception) -> DataError:
    if may_pass(cause):
        return data_error(f"{printable(path)} cannot be read now ({reason})", cause)
    return DataError(
        f"{printable(path)} cannot be decoded ({reason}); remove or replace the file"
    )


def _is_animation(path: Path, images: int) -> DataError:
    return DataError(
        f"{printable(path)} is an animation of {images} images, not one; remove or replace the file"
    )


def _decode_by_torchvision(data: Tensor, channels: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    image = decode_image(data, mode=mode, apply_exif_orientation=True)
    if image.ndim != 3:
        raise _Animation(len(image))
    return _as_bytes(image)  # a 16-bit PNG is decoded as uint16


def _as_bytes(image: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import to_dtype

    pixels: Tensor = to_dtype(image, torch.uint8, scale=True)
    return pixels


def _kind_for_pillow(data: Tensor) -> str | None:
    """What Pillow calls a file that it has to decode; None for those that torchvision decodes."""
    head = data[:32].numpy().tobytes()
    if head[4:12] in AVIF:
        return "AVIF"
    for start, kind in BY_PILLOW.items():
        if head.startswith(start):
            return kind
    # torchvision heeds the orientation of JPEG and PNG files alone.
    has_exif = head[12:16] == WEBP_EXTENDED and head[20] & WEBP_HAS_EXIF
    return "WEBP" if has_exif and _is_turned(data) else None


def _is_turned(data: Tensor) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data.numpy().tobytes())) as image:
            return bool(image.getexif().get(ORIENTATION, 1) != 1)
    except Exception:
        # A damaged file, of which torchvision says what is wrong.
        return False


def _decode_by_pillow(path: Path, data: Tensor, kind: str, channels: int) -> Tensor:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data.numpy().tobytes()), formats=[kind]) as image:
            images = getattr(image, "n_frames", 1)
            if images > 1:
                raise _is_animation(path, images)
            return _pixels(ImageOps.exif_transpose(image), channels)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        reason = f"it is damaged, or of a kind of {kind} that this Pillow does not read"
        raise _cannot_decode(path, reason, error) from None
    except Exception as error:
        # Anything: Pillow's decoders raise whatever a damaged file leads to.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _cannot_decode(path, reason, error) from None


def _pixels(image: Any, channels: int) -> Tensor:
    """A PIL image's pixels, uint8 `(channels, H, W)`. Transparency is dropped, as torchvision does."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    if image.mode.startswith("I;16"):
        grey = _as_bytes(pil_to_tensor(image).to(torch.uint16))
        return grey.expand(channels, -1, -1).clone()
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of Pillow's mode {image.mode}, whose range is not that of brightness"
        )
    pixels: Tensor = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    return pixels
