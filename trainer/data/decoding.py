"""Image files as tensors: by torchvision, and by Pillow the kinds that torchvision does not read or not survive."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.image_checks import (
    GIF_START,
    PNG_START,
    WEBP_KIND,
    WEBP_START,
    Unusable,
    check_size,
    first_line,
    png_for_pillow,
    png_with_gamma,
    size_from_header,
)
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
BY_PILLOW = {PNG_START: "PNG", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
AVIF = (b"ftypavif", b"ftypavis")  # from byte 4 on
# An extended WebP file says in byte 20 what it has besides pixels.
WEBP_EXTENDED = b"VP8X"
WEBP_HAS_EXIF = 0x08
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
# The modes of PNG files without colour, of which Pillow and torchvision make the same grey.
GREY_MODES = ("1", "L", "LA", "I;16")


def decode(path: Path, channels: int = 3, max_pixels: int | None = None) -> Tensor:
    """The image file, uint8 `(channels, H, W)`, in colour (3) or grey (1), turned upright by its EXIF data.

    Raises `DataError` if it cannot be decoded, is an animation or has more than `max_pixels` pixels. No file, however
    damaged, ends the process.
    """
    try:
        data = _read(path)
        check_size(size_from_header(data.numpy().data), max_pixels)
        kind = _kind_for_pillow(data, channels)
        if kind is None:
            return _decode_by_torchvision(data, channels)
        return _decode_by_pillow(data, kind, channels, max_pixels)
    except Unusable as error:
        cause = error.__cause__
        if isinstance(cause, Exception) and may_pass(cause):
            raise data_error(
                f"{printable(path)} cannot be read now ({cause})", cause
            ) from None
        raise DataError(f"{printable(path)} {error}") from None


def _read(path: Path) -> Tensor:
    # Not torchvision's `read_file`, which takes no name that is not UTF-8.
    try:
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    except OSError as error:
        raise Unusable.damaged(error.strerror or str(error)) from error


def _decode_by_torchvision(data: Tensor, channels: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        image = decode_image(data, mode=mode, apply_exif_orientation=True)
    except RuntimeError as error:
        # Without torchvision's own file and line.
        reason = re.sub(r"^.*\.cpp:\d+, ", "", first_line(error))
        raise Unusable.damaged(reason) from error
    if image.ndim != 3:
        raise Unusable.animation(len(image))
    return _as_bytes(image)  # a 16-bit PNG is decoded as uint16


def _as_bytes(image: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import to_dtype

    pixels: Tensor = to_dtype(image, torch.uint8, scale=True)
    return pixels


def _kind_for_pillow(data: Tensor, channels: int) -> str | None:
    """What Pillow calls a file that it has to decode; None for those that torchvision decodes."""
    head = data[:32].numpy().tobytes()
    if head[4:12] in AVIF:
        return "AVIF"
    for start, kind in BY_PILLOW.items():
        if head.startswith(start):
            return kind
    is_webp = head[:4] == WEBP_START and head[8:12] == WEBP_KIND
    # torchvision makes these two kinds grey in no case.
    if channels == 1 and (is_webp or head.startswith(GIF_START)):
        return "WEBP" if is_webp else "GIF"
    # torchvision heeds the orientation of JPEG files alone.
    is_extended = is_webp and len(head) > 20 and head[12:16] == WEBP_EXTENDED
    has_exif = is_extended and head[20] & WEBP_HAS_EXIF
    return "WEBP" if has_exif and _is_turned(data) else None


def _is_turned(data: Tensor) -> bool:
    """Whether a WebP file is to be turned upright."""
    try:
        with _open(io.BytesIO(data.numpy().data), "WEBP") as image:
            return bool(image.getexif().get(ORIENTATION, 1) != 1)
    except Exception:
        # A damaged file, of which torchvision says what is wrong.
        return False


def _decode_by_pillow(
    data: Tensor, kind: str, channels: int, max_pixels: int | None
) -> Tensor:
    content = data.numpy().data
    file = png_for_pillow(content) if kind == "PNG" else content
    try:
        with _open(io.BytesIO(file), kind) as image:
            check_size(image.size, max_pixels)
            images = getattr(image, "n_frames", 1)
            if images > 1:
                raise Unusable.animation(images)
            return _pixels(image, data, channels)
    except Unusable:
        raise
    except Exception as error:
        # Anything: Pillow's decoders raise whatever a damaged file leads to.
        raise Unusable.damaged(first_line(error)) from error


def _open(file: io.BytesIO, kind: str) -> Any:
    """Pillow's image, its pixels not yet decoded. Unlike `Image.open` with no limit but data.max_pixels."""
    from PIL import Image

    if kind not in Image.OPEN:
        Image.init()
    open_file, _ = Image.OPEN[kind]
    try:
        return open_file(file, "")
    except (SyntaxError, IndexError, TypeError, struct.error):
        # What a reader raises for a file that is not of its kind.
        reason = f"it is damaged, or of a kind of {kind} that this Pillow does not read"
        raise Unusable.damaged(reason) from None


def _pixels(image: Any, data: Tensor, channels: int) -> Tensor:
    """A PIL image's pixels, uint8 `(channels, H, W)`. Transparency is dropped, as torchvision does."""
    from PIL.ImageOps import exif_transpose
    from torchvision.transforms.v2.functional import pil_to_tensor

    upright = exif_transpose(image)
    if image.format == "PNG" and channels == 1 and image.mode not in GREY_MODES:
        return _grey_of_png(upright, data)
    if upright.mode.startswith("I;16"):
        grey = _as_bytes(pil_to_tensor(upright).to(torch.uint16))
        return grey.expand(channels, -1, -1).clone()
    if upright.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of Pillow's mode {upright.mode}, whose range is not that of brightness"
        )
    # Of no use without an alpha channel, and Pillow warns of it.
    upright.info.pop("transparency", None)
    pixels: Tensor = pil_to_tensor(upright.convert("L" if channels == 1 else "RGB"))
    return pixels


def _grey_of_png(image: Any, data: Tensor) -> Tensor:
    """The grey that torchvision makes of a PNG file's colours: it heeds the file's gamma, which Pillow does not.

    It decodes a right file, written of what Pillow has decoded.
    """
    image.info.clear()
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=0)
    whole = png_with_gamma(file.getvalue(), data.numpy().data)
    return _decode_by_torchvision(
        torch.frombuffer(bytearray(whole), dtype=torch.uint8), channels=1
    )
